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
        "+capo=kl_budget", f"{BUDGET}.delta=4e-4", "actor_rollout_ref.actor.optim.lr=10",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",  # two optimizer steps per rollout
        "trainer.save_freq=1", "trainer.resume_mode=auto",
    )  # fmt: skip
    python = warm.python()
    first = Run(inputs, output, "first", 3, 0, overrides, PYTHON=python)
    assert first.wait() == 0, first.printed[-4000:]
    rates = [metrics["capo/lr"] for metrics in first.metrics]
    # Means of the two steps of a rollout: tenfold a step at first.
    assert rates[0] == pytest.approx((1e-7 + 1e-6) / 2, rel=0.5) and rates[0] < rates[1] < 1e-2
    for metrics in first.metrics:
        assert metrics["capo/kl_p99"] >= metrics["capo/kl_mean"] > metrics["capo/kl_floor"] > 0
        assert metrics["capo/kl_probe_seconds"] > 0 and metrics["actor/lr"] == 10
    deltas = [metrics["capo/kl_delta"] for metrics in first.metrics]
    assert deltas == pytest.approx([1e-4, 0.55e-4, 0.1e-4])
    saved = [
        json.loads((output / f"checkpoints/global_step_{i}/actor/capo/control.json").read_text())
        for i in (1, 2, 3)
    ]
    assert [each["kl_budget"]["measured"] for each in saved] == [1, 3, 5]
    assert not saved[2]["moments"]

    second = Run(inputs, output, "second", 4, 3, overrides, PYTHON=python)
    assert second.wait() == 0, second.printed[-4000:]
    assert "holds no state of a KL budget" not in second.printed
    assert second.metrics[0]["capo/lr"] > 10 * rates[0]
    assert second.metrics[0]["capo/kl_floor"] == saved[2]["kl_budget"]["floor"]
