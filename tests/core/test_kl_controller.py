# SPDX-License-Identifier: Apache-2.0
"""The controller of the learning rate, step by step against numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from capo_verl.config import KLBudgetConfig
from capo_verl.core.kl_budget import KLBudget


def budget(**knobs: Any) -> KLBudget:
    return KLBudget(KLBudgetConfig(**{"delta": 1e-4, "eta": 0.2, "scale_min": 1e-3, **knobs}))


def test_a_step_moves_the_logarithm_by_half_the_ratio_clipped_at_one():
    control = budget()
    assert control.begin_step() == 1.0
    control.end_step(4e-4)  # log(1/4) / 2 = -0.693
    assert control.scale == pytest.approx(math.exp(-0.2 * math.log(2)), rel=1e-12)
    control.end_step(1.0)  # clipped
    assert control.scale == pytest.approx(math.exp(-0.2 * math.log(2) - 0.2), rel=1e-12)
    control.end_step(0.5e-4)
    assert control.scale == pytest.approx(math.exp(-0.1 * math.log(2) - 0.2), rel=1e-12)
    assert control.begin_step() == control.scale
    control.end_step(1e-30)
    assert control.scale == pytest.approx(math.exp(-0.1 * math.log(2)), rel=1e-12)


def test_the_scale_stays_between_its_floor_and_one():
    control = budget(eta=1.0, scale_min=0.05)
    control.end_step(1e-9)
    assert control.scale == 1.0
    for _ in range(5):
        control.end_step(math.inf)
    assert control.scale == control.begin_step() == 0.05


def test_what_counts_as_a_measurement():
    control = budget()
    control.end_step(1.0)
    low = control.scale
    for nothing in (None, -1e-12):
        control.end_step(nothing)
        assert control.scale == low
    with pytest.raises(ValueError, match="kl is NaN"):
        control.end_step(math.nan)
    assert control.scale == low
    control.end_step(0.0)
    assert control.scale == pytest.approx(low * math.exp(0.2), rel=1e-12)


def test_converges_to_the_scale_whose_kl_is_the_budget():
    """KL = c s^2 with c = 0.04: s = sqrt(1e-4 / 0.04) = 0.05."""
    control = budget()
    for _ in range(100):
        factor = control.begin_step()
        control.end_step(0.04 * factor**2)
    assert control.scale == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(
    ("kl", "keeps"), [(2e-4, None), (2.1e-4, math.sqrt(1 / 2.1)), (1e-2, 0.1), (math.nan, None)]
)
def test_line_search(kl, keeps):
    found = budget(line_search=2.0).needs_line_search(kl)
    assert found == (None if keeps is None else pytest.approx(keeps, rel=1e-12))
    assert budget().needs_line_search(kl) is None


def test_state_continues_exactly():
    control = budget()
    for kl in (3e-4, 7e-5, 2e-3):
        control.end_step(kl)
    resumed = budget()
    resumed.load_state_dict(control.state_dict())
    assert resumed.begin_step() == control.begin_step() < 1
    for one in (control, resumed):
        one.end_step(5e-4)
    assert resumed.state_dict() == control.state_dict() == {"scale": control.scale}


def test_a_state_of_a_release_with_predictors_loads():
    control = budget()
    control.load_state_dict({"scale": 0.25, "calibration": 3.0})
    assert control.state_dict() == {"scale": 0.25}


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "expected the key scale, got none"),
        ({"scale": 0.5, "other": 1.0}, "expected the key scale, got other, scale"),
        ({"scale": 0.0}, "scale=0.0, expected a positive number"),
        ({"scale": 2.0}, "scale=2.0, expected at most 1"),
        ({"scale": math.nan}, "scale=nan"),
        ({"scale": "1"}, "scale='1'"),
        ({"scale": 0.5, "calibration": math.inf}, "calibration=inf"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(state, says):
    control = budget()
    control.end_step(1.0)
    before = control.state_dict()
    with pytest.raises(ValueError, match=says):
        control.load_state_dict(state)
    assert control.state_dict() == before


def test_a_higher_floor_wins_over_a_saved_scale():
    control = budget(scale_min=0.1)
    control.load_state_dict({"scale": 0.01})
    assert control.scale == 0.1
