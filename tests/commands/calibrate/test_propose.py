# SPDX-License-Identifier: Apache-2.0
"""The proposal: numbers on made-up steps; verl takes the overrides."""

from __future__ import annotations

import shlex

import numpy as np
import pytest

from capo_verl.commands.calibrate.propose import DELTA, overrides, propose, round_up
from capo_verl.commands.calibrate.step import StepMeasurement
from capo_verl.config import KLBudgetConfig


def step(policy: np.ndarray, objective: np.ndarray, kl: float) -> StepMeasurement:
    tokens = {"policy_shift": policy, "objective_shift": objective}
    return StepMeasurement(tokens, {}, {}, {"kl_token_mean/all": kl})


def made_up(kls: tuple[float, ...] = (1.0, 1.2e-3, 1.2e-3)) -> list[StepMeasurement]:
    uniform = (np.arange(1000) + 0.5) / 1000
    signs = np.where(np.arange(1000) % 2, 1, -1)
    first = step(
        np.full(1000, 9.0), np.full(1000, 9.0), kls[0]
    )  # its moments are empty: not to be used
    return [first, *(step(1e-4 * uniform, 1e-2 * signs * uniform[::-1], kl) for kl in kls[1:])]


def test_thresholds_reject_the_share_asked_for() -> None:
    found = propose(made_up(), rejection=0.1)
    assert found.policy_shift_max == pytest.approx(9e-5)
    assert found.objective_shift_max == pytest.approx(9e-3)
    assert found.rejected == pytest.approx(0.2)  # the tokens of one are not those of the other here
    assert found.steps == 2
    assert found.kl == pytest.approx(1.2e-3)
    assert found.scale == pytest.approx((DELTA / 1.2e-3) ** 0.5)
    assert propose(made_up((1.0, 1e-6, 1e-6))).scale == pytest.approx((DELTA / 1e-6) ** 0.5)


def test_rounding_goes_up() -> None:
    assert round_up(1.201e-5) == 1.3e-5
    assert round_up(1.2e-5) == 1.2e-5
    assert round_up(9.95e-3) == 1e-2
    assert round_up(0.0) == 0.0


@pytest.mark.parametrize("rejection", [0, 1, -0.1])
def test_impossible_shares_are_refused(rejection: float) -> None:
    with pytest.raises(ValueError, match="--rejection"):
        propose(made_up(), rejection)


def test_verl_takes_the_overrides() -> None:
    pytest.importorskip("verl")
    from hydra import compose, initialize_config_module

    from capo_verl.config import parse_knobs

    parsed = {}
    with initialize_config_module("verl.trainer.config", version_base=None):
        for what, text in overrides(propose(made_up(), 0.1)).items():
            config = compose("ppo_trainer", overrides=["model_engine=megatron", *shlex.split(text)])
            parsed[what] = parse_knobs(config.actor_rollout_ref.actor.policy_loss.capo)
    fixed, following, budget = parsed.values()
    assert (fixed.policy_shift_max, fixed.objective_shift_max) == (9e-5, 9e-3)
    assert following.policy_shift_max.target_rejection == 0.1
    assert budget.kl_budget.delta == DELTA == KLBudgetConfig().delta
