# SPDX-License-Identifier: Apache-2.0
"""Soft weights, adaptive thresholds and penalties inside verl's Megatron engine, against Hugging
Face + the float64 filter.
"""

from __future__ import annotations

import pytest

from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.capo_cases import train
from tests.engines.megatron.capo_reference import (
    Reference,
    check_meaningful,
    check_training,
    make_reference,
)
from tests.engines.megatron.weighting_knobs import PENALTY, SOFT
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def references(tiny_qwen2) -> dict[str, Reference]:
    return {
        name: make_reference(tiny_qwen2, TEMPERATURE, knobs=knobs)
        for name, knobs in (("soft", SOFT), ("penalty", PENALTY))
    }


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2, packed=False)], ids=str
)
def test_soft_weights_with_an_adaptive_threshold(layout, references, tiny_qwen2):
    ranks = run_on_ranks(
        train,
        layout.world_size,
        layout,
        tiny_qwen2,
        "capo",
        SOFT,
        TEMPERATURE,
        2,
        preload=ENGINE_MODULES,
    )
    check_training(ranks, layout.dp, references["soft"])
    reports = next(rank["reports"] for rank in ranks if rank["reports"])
    # Two steps reject nothing: before there are moments, and before there is a quantile.
    weights, thresholds = (
        [report.get(f"capo/{name}") for report in reports]
        for name in ("weight_mean", "policy_threshold")
    )
    assert weights[0] == weights[1] == [1.0] and 0 < weights[2][0] < 1
    assert thresholds[:2] == [None, None] and thresholds[2][0] > 0


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2, packed=False)], ids=str
)
def test_penalties(layout, references, tiny_qwen2):
    check_meaningful(references["penalty"])
    ranks = run_on_ranks(
        train,
        layout.world_size,
        layout,
        tiny_qwen2,
        "capo",
        PENALTY,
        TEMPERATURE,
        2,
        preload=ENGINE_MODULES,
    )
    check_training(ranks, layout.dp, references["penalty"])
    reports = next(rank["reports"] for rank in ranks if rank["reports"])
    assert all(abs(report["capo/penalty_mean"][0]) > 1e-3 for report in reports)


def test_the_penalty_matters(references, tiny_qwen2):
    """What the two tests above compare would differ without it."""
    without = make_reference(tiny_qwen2, TEMPERATURE)
    assert abs(without.steps[0].loss - references["penalty"].steps[0].loss) > 1e-2
    assert abs(without.steps[1].grad_norm / references["penalty"].steps[1].grad_norm - 1) > 0.1
