# SPDX-License-Identifier: Apache-2.0
"""``batch_shift_every`` and ``track_every``: what is reported when, also after a resume, and that
nothing else changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from capo_verl.config import CapoConfig
from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.capo_cases import KNOBS
from tests.engines.megatron.knob_cases import all_of
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

ENGINES = pytest.mark.parametrize("layout", [Layout(packed=False), FsdpLayout()], ids=str)
BATCH_SHIFTS = {
    "capo/batch_objective_shift_before", "capo/batch_objective_shift_after",
    "capo/batch_policy_shift_before", "capo/batch_policy_shift_after", "capo/batch_shift_coverage",
}  # fmt: skip


def results(layout: Any, model: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return run_on_ranks(all_of, 1, layout, model, runs, preload=ENGINE_MODULES, timeout=400)[0]


def check_same_training(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


def check_same_moments(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["moments"]["step"] == b["moments"]["step"]
    assert all(
        torch.equal(a["moments"][name], b["moments"][name]) for name in ("exp_avg", "exp_avg_sq")
    )


def numbers(report: dict[str, Any], without: set[str] = frozenset()) -> dict[str, Any]:
    return {k: v for k, v in report.items() if k not in without and "seconds" not in k}


@pytest.mark.parametrize(
    ("knobs", "measured", "batch_shifts"),
    [
        ({}, range(30), (0, 10, 20)),
        ({"batch_shift_every": 1}, range(30), range(30)),
        ({"batch_shift_every": 7}, range(30), (0, 7, 14, 21, 28)),
        ({"batch_shift_every": 7, "batch_shift_tokens": 0}, range(30), ()),
        (
            {"batch_shift_every": 2, "mode": "track", "track_every": 6},
            (0, 6, 12, 18, 24),
            (0, 12, 24),
        ),
    ],
)
def test_which_steps(knobs, measured, batch_shifts):
    config = CapoConfig(**knobs)
    assert [step for step in range(30) if config.measures(step)] == list(measured)
    assert [step for step in range(30) if config.takes_batch_shifts(step)] == list(batch_shifts)


@ENGINES
def test_batch_shifts_come_every_nth_step_and_decide_nothing(layout, tiny_qwen2, tmp_path):
    path = str(tmp_path / "global_step_1" / "actor")
    every, second, off, resumed = results(
        layout,
        tiny_qwen2,
        [
            {"knobs": {**KNOBS, "batch_shift_every": 1}, "steps": 4},
            {"knobs": {**KNOBS, "batch_shift_every": 2}, "steps": 4, "save_after": (1, path)},
            {"knobs": {**KNOBS, "batch_shift_tokens": 0}, "steps": 4},
            {"knobs": {**KNOBS, "batch_shift_every": 2}, "steps": 3, "load": path},
        ],
    )
    assert [set(report) >= BATCH_SHIFTS for report in every["reports"]] == [True] * 4
    for at, (a, b, c) in enumerate(zip(*(x["reports"] for x in (every, second, off)), strict=True)):
        assert 0 < a["capo/rejection_rate"][0] < 1  # there is something to get wrong
        assert numbers(b) == numbers(a, BATCH_SHIFTS if at % 2 else set())
        assert numbers(c) == numbers(a, BATCH_SHIFTS)
    for other in (second, off):
        check_same_training(every, other)
        check_same_moments(every, other)
    # A run resumed after one step keeps the phase, and repeats the other's numbers.
    assert [numbers(report) for report in resumed["reports"]] == [
        numbers(report) for report in second["reports"][1:]
    ]
    assert [set(report) >= BATCH_SHIFTS for report in resumed["reports"]] == [False, True, False]
    check_same_training(second, resumed)
    check_same_moments(second, resumed)


@ENGINES
def test_tracking_every_nth_step_does_nothing_in_between(layout, tiny_qwen2, tmp_path):
    path = str(tmp_path / "global_step_2" / "actor")
    third = {**KNOBS, "mode": "track", "track_every": 3}
    plain, tracked, resumed, always = results(
        layout,
        tiny_qwen2,
        [
            {"knobs": None, "steps": 5, "loss_mode": "vanilla"},
            {"knobs": third, "steps": 5, "loss_mode": "vanilla", "save_after": (2, path)},
            {"knobs": third, "steps": 3, "loss_mode": "vanilla", "load": path},
            {"knobs": {**third, "track_every": 1}, "steps": 5, "loss_mode": "vanilla"},
        ],
    )
    for run in (tracked, always):
        check_same_training(plain, run)
    assert [bool(report) for report in tracked["reports"]] == [True, False, False, True, False]
    assert (
        tracked["moments"]["step"] == 2 and always["moments"]["step"] == 5
    )  # the moments see the measured steps only
    assert numbers(tracked["reports"][0]) == numbers(always["reports"][0])
    # The same gradients under other moments.
    a, b = tracked["reports"][3], always["reports"][3]
    assert a["capo/outside_support"] == b["capo/outside_support"]
    assert (
        a["capo/policy_shift_mean"][0] > 0
        and a["capo/policy_shift_mean"] != b["capo/policy_shift_mean"]
    )
    # Resumed after two steps: the next is not measured, the one after it is.
    assert [numbers(report) for report in resumed["reports"]] == [
        numbers(report) for report in tracked["reports"][2:]
    ]
    check_same_training(tracked, resumed)
    check_same_moments(tracked, resumed)


def test_all_optimizer_steps_of_a_training_step_are_treated_alike(tiny_qwen2):
    """verl moves the schedule, by which steps are counted, once per training step."""
    knobs = {**KNOBS, "mode": "track", "track_every": 2, "batch_shift_every": 2}
    (run,) = results(
        Layout(packed=False),
        tiny_qwen2,
        [{"knobs": knobs, "steps": 5, "loss_mode": "vanilla", "mini_batches": 2}],
    )
    assert [bool(report) for report in run["reports"]] == [True, True, False, False] * 2 + [
        True,
        True,
    ]
    with_batch_shifts = [
        at for at, report in enumerate(run["reports"]) if set(report) >= BATCH_SHIFTS
    ]
    assert with_batch_shifts == [0, 1, 8, 9]
