# SPDX-License-Identifier: Apache-2.0
"""verl's own vLLM server through its ``main_ppo`` on two ranks: the weights of every step, a
resume, two replicas, FSDP2.
"""

from __future__ import annotations

import pytest

from tests.e2e.test_training import CAPO_AND_CHECKPOINTS, Run, output  # noqa: F401
from tests.helpers import warm
from tests.helpers.tiny_inputs import make_inputs

pytestmark = pytest.mark.e2e
pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """With heads of 32, which vLLM knows."""
    return make_inputs(tmp_path_factory.mktemp("inputs"), hidden_size=128)


def test_the_weights_of_every_step_reach_vllm(inputs, output):  # noqa: F811
    variables = {"INFER_BACKEND": "vllm", "PYTHON": warm.python()}
    first = Run(inputs, output, "first", 3, 0, CAPO_AND_CHECKPOINTS, **variables)
    assert first.wait() == 0, first.printed[-4000:]
    # One replica of two ranks, then two of one.
    two = (*CAPO_AND_CHECKPOINTS, "actor_rollout_ref.rollout.tensor_model_parallel_size=1")
    second = Run(inputs, output, "second", 4, 3, two, **variables)
    assert second.wait() == 0, second.printed[-4000:]
    steps = [*first.metrics, *second.metrics]
    assert [metrics["training/global_step"] for metrics in steps] == [1, 2, 3, 4]
    # A step that rejects all of its tokens moves nothing.
    assert sum(metrics["capo/rejection_rate"] < 1 for metrics in steps) >= 3
    _assert_weights_are_of_the_step(steps)


def test_the_weights_of_fsdp2_reach_vllm(inputs, output):  # noqa: F811
    overrides = (
        "+capo=grpo",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.policy_loss.capo.policy_shift_max=1.2e-2",
        "actor_rollout_ref.actor.policy_loss.capo.objective_shift_max=null",
    )
    variables = {"INFER_BACKEND": "vllm", "MODEL_ENGINE": "dp", "PYTHON": warm.python()}
    run = Run(inputs, output, "fsdp2", 2, 0, overrides, **variables)
    assert run.wait() == 0, run.printed[-4000:]
    assert len(run.metrics) == 2 and run.metrics[0]["capo/rejection_rate"] < 1
    _assert_weights_are_of_the_step(run.metrics)


def _assert_weights_are_of_the_step(steps):
    for metrics in steps:
        assert metrics["training/rollout_probs_diff_max"] < 1e-5
        # Nats that a step moves the policy: weights of the step before would show.
        assert metrics["capo/policy_shift_mean"] > 1e-4
