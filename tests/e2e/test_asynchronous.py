# SPDX-License-Identifier: Apache-2.0
"""verl's asynchronous trainers through its ``main_ppo`` on two ranks."""

from __future__ import annotations

import json

import pytest

from tests.e2e.test_training import CAPO_AND_CHECKPOINTS, Run, inputs, output  # noqa: F401
from tests.helpers import warm

pytestmark = pytest.mark.e2e


def test_colocated_stopped_and_resumed(inputs, output):  # noqa: F811
    overrides = ("+capo=kl_budget", "trainer.save_freq=10", "trainer.resume_mode=auto")
    variables = {"TRAINER_MODE": "colocate_async", "PYTHON": warm.python()}
    checkpoints = output / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "stop").touch()  # asks for a stop after the first step
    first = Run(inputs, output, "first", 3, 0, overrides, **variables)
    assert first.wait() == 0, first.printed[-4000:]
    assert [metrics["training/global_step"] for metrics in first.metrics] == [1]
    progress = json.loads((checkpoints / "progress.json").read_text())
    assert (progress["step"], progress["checkpoint"], progress["stopped"]) == (1, 1, True)

    second = Run(inputs, output, "second", 3, 1, overrides, **variables)
    assert second.wait() == 0, second.printed[-4000:]
    assert [metrics["training/global_step"] for metrics in second.metrics] == [2, 3]
    rates = [metrics["capo/lr"] for metrics in (*first.metrics, *second.metrics)]
    assert rates[0] == pytest.approx(1e-7) and rates[0] < rates[1] < rates[2]
    # The rollouts that were there when the run was stopped are trained on.
    assert second.metrics[0]["training/off_policy/trajectory_staleness/max"] == 1


def test_separate_rollouts_are_of_the_old_policy(inputs, output):  # noqa: F811
    """Two optimizer steps for each update of the servers; rollouts begin when the step does."""
    overrides = (
        *(each for each in CAPO_AND_CHECKPOINTS if "ppo_" not in each),
        "trainer.v1.separate_async.num_warmup_batches=0",
        "actor_rollout_ref.model.use_remove_padding=True",
    )
    variables = {
        "TRAINER_MODE": "separate_async", "PARAMETER_SYNC_STEP": 2, "MODEL_ENGINE": "dp",
        "PYTHON": warm.python(),
    }  # fmt: skip
    run = Run(inputs, output, "run", 3, 0, overrides, **variables)
    assert run.wait() == 0, run.printed[-4000:]
    assert len(run.metrics) == 3
    for metrics in run.metrics:
        assert metrics["training/rollout_probs_diff_max"] < 1e-5
        assert metrics["training/off_policy/trajectory_staleness/max"] == 0
        # Nats that a step moves the policy: weights of the step before would show.
        assert metrics["capo/policy_shift_mean"] > 1e-4
    assert (output / "checkpoints/global_step_3/transfer_queue").exists()
