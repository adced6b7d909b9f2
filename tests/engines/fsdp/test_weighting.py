# SPDX-License-Identifier: Apache-2.0
"""Soft weights, adaptive thresholds and penalties inside verl's FSDP engine, against the reference
of the Megatron engine.
"""

from __future__ import annotations

import pytest

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.engines.fsdp.capo_cases import train
from tests.engines.megatron.capo_reference import check_training, make_reference
from tests.engines.megatron.weighting_knobs import PENALTY, SOFT
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

TEMPERATURE = 0.7


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (FsdpLayout("fsdp2", 2), "soft"),
        (FsdpLayout("fsdp", packed=False), "soft"),
        (FsdpLayout("fsdp", 2, fused="torch"), "soft"),
        (FsdpLayout(sp=2), "soft"),
        (FsdpLayout("fsdp2", 2), "penalty"),
        (FsdpLayout("fsdp", 2, packed=False), "penalty"),
    ],
    ids=str,
)
def test_training_equals_the_reference(layout, name, tiny_qwen2):
    knobs = {"soft": SOFT, "penalty": PENALTY}[name]
    reference = make_reference(tiny_qwen2, TEMPERATURE, knobs=knobs)
    ranks = run_on_ranks(
        train,
        layout.world_size,
        layout,
        tiny_qwen2,
        "capo",
        knobs,
        TEMPERATURE,
        preload=ENGINE_MODULES,
    )
    check_training(ranks, layout.dp, reference)
    report = next(rank["reports"] for rank in ranks if rank["reports"])[-1]
    assert ("capo/penalty_mean" in report) == (name == "penalty")
    assert 0 < report["capo/weight_mean"][0] < 1


def test_penalties_without_logits_or_with_split_sequences_are_refused(tiny_qwen2):
    """By the filter too, should the checks before the start have been passed by."""
    for layout, message in (
        (FsdpLayout(sp=2), "context parallelism of size 2"),
        (FsdpLayout("fsdp", fused="torch"), "logits"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_on_ranks(
                train,
                layout.world_size,
                layout,
                tiny_qwen2,
                "capo",
                PENALTY,
                preload=ENGINE_MODULES,
            )
