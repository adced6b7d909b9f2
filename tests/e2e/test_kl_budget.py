# SPDX-License-Identifier: Apache-2.0
"""``+capo=kl_budget`` through verl's own ``main_ppo`` on two ranks: what reaches the logs and the
checkpoint, and a resume.
"""

from __future__ import annotations

import json

import pytest

from tests.e2e.test_training import Run, inputs, output  # noqa: F401  fixtures
from tests.helpers import warm

pytestmark = pytest.mark.e2e
BUDGET = "actor_rollout_ref.actor.policy_loss.capo.kl_budget"


def test_the_learning_rate_follows_the_measured_kl(inputs, output):  # noqa: F811
    overrides = (
        "+capo=kl_budget", f"{BUDGET}.delta=1e-5", f"{BUDGET}.eta=0.5",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",  # two optimizer steps per rollout
        "trainer.save_freq=1", "trainer.resume_mode=auto",
    )  # fmt: skip
    python = warm.python()
    first = Run(inputs, output, "first", 2, 0, overrides, PYTHON=python)
    assert first.wait() == 0, first.printed[-4000:]
    for metrics in first.metrics:
        assert metrics["capo/kl_mean"] > 1e-5 and metrics["capo/kl_p99"] >= metrics["capo/kl_mean"]
        assert 0 < metrics["capo/kl_budget_scale"] < metrics["capo/lr_scale"] <= 1
        assert metrics["capo/kl_probe_seconds"] > 0 and metrics["actor/lr"] == 3e-3
    saved = [
        json.loads((output / f"checkpoints/global_step_{i}/actor/capo/control.json").read_text())
        for i in (1, 2)
    ]
    assert (
        saved[1]["kl_budget"]["scale"] < saved[0]["kl_budget"]["scale"] < 1
        and not saved[1]["moments"]
    )

    second = Run(inputs, output, "second", 3, 2, overrides, PYTHON=python)
    assert second.wait() == 0, second.printed[-4000:]
    assert "holds no state of a KL budget" not in second.printed
    assert second.metrics[0]["capo/lr_scale"] <= saved[1]["kl_budget"]["scale"] * 1.3 < 0.5
