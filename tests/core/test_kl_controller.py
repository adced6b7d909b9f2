# SPDX-License-Identifier: Apache-2.0
"""The controller of the learning rate, step by step against numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from capo_verl.config import KLBudgetConfig
from capo_verl.core.kl_budget import KLBudget, decay

LR = 1e-2
STATE = {"curvature": 4e4, "measured": 3, "floor": 1e-9, "rate": 1e-4}


def budget(**knobs: Any) -> KLBudget:
    return KLBudget(KLBudgetConfig(**{"delta": 1e-3, "eta": 0.2, "final_share": 1.0, **knobs}))


def steps(control: KLBudget, kl_of: Any, count: int, scheduled: float = LR) -> list[float]:
    """Rates of so many steps whose KL is ``kl_of(rate)``."""
    rates = []
    for _ in range(count):
        rates.append(control.begin_step(scheduled, LR))
        control.end_step(kl_of(rates[-1]))
    return rates


def at(control: KLBudget, **state: Any) -> KLBudget:
    control.load_state_dict({**STATE, **state})
    return control


@pytest.mark.parametrize("lr", [1e-6, 1e-4, 1e-2, 1.0])
def test_the_first_steps_do_not_depend_on_the_learning_rate(lr):
    """KL = 1e5 a^2: a = 1e-4 from wherever it starts."""
    control, rates = budget(), []
    for _ in range(6):
        rates.append(control.begin_step(lr, lr))
        control.end_step(1e5 * rates[-1] ** 2)
    assert rates[:3] == pytest.approx([1e-7, 1e-6, 1e-5], rel=1e-9)
    assert rates[3:] == pytest.approx([1e-4, 1e-4, 1e-4], rel=0.01)


def test_a_rate_is_the_root_of_budget_over_curvature():
    control = at(budget())
    assert control.begin_step(LR, LR) == pytest.approx(math.sqrt(1e-3 / 4e4), rel=1e-12)
    assert control.delta == 1e-3


def test_the_average_is_arithmetic_and_the_first_measurement_whole():
    control = budget(eta=0.25)
    control.begin_step(LR, LR)
    control.end_step(1e-12)
    found = []
    for i, kappa in enumerate((4e4, 2e4, 9e4, 1e4, 6e4)):
        rate = control.begin_step(LR, LR)
        control.end_step(1e-12 + kappa * rate**2)
        found.append(control.curvature)
        assert control.measured == i + 1
    means = [4e4, 3e4, 5e4, 4e4]
    assert found == pytest.approx([*means, 4e4 + 0.25 * 2e4], rel=1e-6)


@pytest.mark.parametrize(
    ("progress", "share", "expected"),
    [(0, 0.1, 1.0), (0.5, 0.1, 0.55), (1, 0.1, 0.1), (0.25, 0.0, 0.5 + 0.25 * 2**0.5), (1, 1, 1)],
)
def test_decay(progress, share, expected):
    assert decay(progress, share) == pytest.approx(expected, rel=1e-12)


def test_warm_up_and_decay_multiply_the_budget():
    control = at(budget(final_share=0.1))
    rate = control.begin_step(0.3 * LR, LR, progress=0.5)
    assert control.delta == pytest.approx(1e-3 * 0.09 * 0.55, rel=1e-12)
    assert rate == pytest.approx(math.sqrt(control.delta / 4e4), rel=1e-12)


@pytest.mark.parametrize(("completions", "factor"), [(8, 0.25), (32, 1), (128, 4), (1024, 4)])
def test_the_budget_grows_with_the_batch(completions, factor):
    control = at(budget())
    rate = control.begin_step(LR, LR, completions=completions)
    assert control.delta == pytest.approx(factor * 1e-3, rel=1e-12)
    assert rate == pytest.approx(math.sqrt(factor * 1e-3 / 4e4), rel=1e-12)


def test_a_warm_up_that_starts_at_nothing():
    control = budget()
    assert control.begin_step(0.0, LR) == 0.0
    control.end_step(5e-3)  # rounding: the step was none
    assert control.state_dict() == {"curvature": None, "measured": 0, "floor": None, "rate": None}
    assert control.begin_step(1e-3, LR) == 1e-7


@pytest.mark.parametrize(
    ("knobs", "rate"),
    [({}, 1e-3), ({"rate_max": 0.01}, 1e-4), ({"rate_max": 1}, 1e-3), ({"rate_min": 0.5}, 5e-3)],
)
def test_limits_are_multiples_of_the_scheduled_rate(knobs, rate):
    assert at(budget(**knobs), curvature=1e3, rate=1e-3).begin_step(LR, LR) == pytest.approx(rate)


def test_no_limit_lengthens_the_first_step():
    assert budget(rate_min=1.0).begin_step(LR, LR) == 1e-7
    assert budget(rate_max=1.0).begin_step(5e-8, 5e-8) == pytest.approx(5e-9)


def test_a_rate_grows_tenfold_at_most():
    assert at(budget(), curvature=1e-3, rate=1e-6).begin_step(LR, LR) == pytest.approx(1e-5)


def test_rounding_is_taken_off_what_is_measured():
    """KL = 1e-3 + 1e9 a^2, as bfloat16 may measure; the budget is twice the floor."""
    control = budget(delta=2e-3)
    rates = steps(control, lambda a: 1e-3 + 1e9 * a * a, 12)
    assert control.floor == pytest.approx(1e-3, rel=0.02)
    assert rates[1] == pytest.approx(2e-7, rel=0.02)  # towards a KL of 8 floors, unseen so far
    assert rates[-1] == pytest.approx(math.sqrt(2e-3 / 1e9), rel=0.02)
    assert max(1e9 * a * a for a in rates) < 8e-3


def test_a_budget_below_the_floor_keeps_the_curvature_it_found():
    control = budget(delta=5e-4)
    steps(control, lambda a: 1e-3 + 1e9 * a * a, 8)
    measured, curvature = control.measured, control.curvature
    assert measured >= 1 and curvature == pytest.approx(1e9, rel=0.02)
    steps(control, lambda a: 1.4e-3, 5)
    assert (control.measured, control.curvature) == (measured, curvature)
    control.begin_step(LR, LR)
    control.end_step(3.1e-3)  # three floors: seen whatever the budget is
    assert control.measured == measured + 1 and control.curvature > curvature


def test_what_does_not_move_never_passes_the_users_rate():
    """A model that answers everything wrong has no gradient: then the first one is met at most at
    the user's rate.
    """
    control = budget()
    assert max(steps(control, lambda a: 0.0, 9)) == LR
    assert control.floor is None and control.curvature is None


@pytest.mark.parametrize("kl", [math.inf, 30.0, 1.0])
def test_a_policy_that_is_gone_counts_as_one_nat(kl):
    control = at(budget(), rate=1e-3)
    rate = control.begin_step(LR, LR)
    control.end_step(kl)
    assert control.curvature == pytest.approx(4e4 + 0.25 * (1 / rate**2 - 4e4), rel=1e-6)


@pytest.mark.parametrize(("kl", "says"), [(math.nan, "kl is NaN"), ("1", "kl='1'")])
def test_what_is_no_measurement_changes_nothing(kl, says):
    control = at(budget())
    control.begin_step(LR, LR)
    with pytest.raises(ValueError, match=says):
        control.end_step(kl)
    control.end_step(None)
    assert control.state_dict() == STATE


@pytest.mark.parametrize(
    ("kl", "keeps"), [(2e-3, None), (2.1e-3, math.sqrt(1 / 2.1)), (0.1, 0.1), (math.nan, None)]
)
def test_line_search(kl, keeps):
    found = budget(line_search=2.0).needs_line_search(kl)
    assert found == (None if keeps is None else pytest.approx(keeps, rel=1e-12))
    assert budget().needs_line_search(kl) is None


def test_state_continues_exactly():
    control = budget()
    steps(control, lambda a: 3e4 * a * a, 4)
    resumed = budget()
    resumed.load_state_dict(control.state_dict())
    for one in (control, resumed):
        steps(one, lambda a: 5e4 * a * a, 3)
    assert resumed.state_dict() == control.state_dict()
    assert control.measured == 6 and control.rate == pytest.approx(1.8e-4, rel=0.1)


@pytest.mark.parametrize("state", [{"scale": 0.25}, {"scale": 0.25, "calibration": 3.0}])
def test_the_scale_of_an_older_release_is_a_fresh_start(state):
    control = budget()
    control.load_state_dict(state)
    assert control.begin_step(LR, LR) == 1e-7


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({}, "expected the keys curvature, measured, floor, rate, got none"),
        ({**STATE, "other": 1.0}, "got curvature, floor, measured, other, rate"),
        ({**STATE, "curvature": 0.0}, "curvature=0.0, expected a positive number, or null"),
        ({**STATE, "floor": -1.0}, "floor=-1.0, expected a positive number, or null"),
        ({**STATE, "rate": math.nan}, "rate=nan"),
        ({**STATE, "rate": "1"}, "rate='1'"),
        ({**STATE, "measured": 1.5}, "measured=1.5, expected an integer >= 0"),
        ({**STATE, "measured": None}, "measured=None, expected an integer >= 0"),
        ({**STATE, "measured": 0}, "curvature=40000.0 of measured=0 measurements contradict"),
        ({**STATE, "curvature": None}, "curvature=None of measured=3 measurements contradict"),
        ({"scale": 0.0}, "scale=0.0, expected a positive number"),
        ([1.0], "expected a dict"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(state, says):
    control = at(budget())
    with pytest.raises(ValueError, match=says):
        control.load_state_dict(state)
    assert control.state_dict() == STATE
