# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts through verl's ``main_ppo`` on two ranks: each has half of the experts, and
takes those that the rollout server chose.
"""

from __future__ import annotations

import pytest

from tests.e2e.test_training import Run, output  # noqa: F401
from tests.helpers import warm
from tests.helpers.tiny_inputs import make_inputs

pytestmark = pytest.mark.e2e


def test_the_rollouts_choices_are_replayed(tmp_path, output):  # noqa: F811
    inputs = make_inputs(tmp_path / "inputs", model_type="qwen3_moe")
    overrides = (
        "+capo=grpo",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.policy_loss.capo.policy_shift_max=1.2e-2",
        "actor_rollout_ref.actor.policy_loss.capo.objective_shift_max=null",
        "actor_rollout_ref.actor.megatron.expert_model_parallel_size=2",
        "actor_rollout_ref.actor.megatron.router_replay.mode=R3",
        "actor_rollout_ref.rollout.enable_rollout_routing_replay=True",
        "actor_rollout_ref.rollout.moe_load_balance_metrics_interval=1",
        "actor_rollout_ref.model.use_remove_padding=True",
    )
    run = Run(
        inputs, output, "experts", 3, 0, overrides,
        ACTOR_TP=1, NPROCS=2, PYTHON=warm.python(),
    )  # fmt: skip
    assert run.wait() == 0, run.printed[-4000:]
    assert len(run.metrics) == 3
    for metrics in run.metrics:
        assert metrics["rollout/moe/routed_experts_found"] == 1
        assert metrics["training/rollout_probs_diff_max"] < 1e-5
        # Nats that a step moves the policy: weights of the step before would show.
        assert metrics["capo/policy_shift_mean"] > 1e-4
    assert 0 < max(metrics["capo/rejection_rate"] for metrics in run.metrics) < 1
