# SPDX-License-Identifier: Apache-2.0
"""CAPO inside verl's FSDP engine on gloo ranks, against Hugging Face + the filter in float64 +
torch's AdamW.

The reference is the one of the Megatron engine, same model and batch, so the two engines agree as
well.
"""

from __future__ import annotations

import pytest
import torch

from tests.cpu.fsdp.engine_cases import FsdpLayout, write_adapter
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.fsdp.capo_cases import filter_under_autocast, train, without_parameter_groups
from tests.engines.megatron import capo_cases as megatron
from tests.engines.megatron.capo_cases import KNOBS
from tests.engines.megatron.capo_reference import (
    Reference,
    check_meaningful,
    check_training,
    check_untouched,
    make_reference,
)
from tests.engines.megatron.test_faults import stops, with_and_without
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks
from tests.helpers.tiny_model import make_tiny_model

LAYOUTS = [
    *(
        FsdpLayout(strategy, dp, packed)
        for strategy in ("fsdp2", "fsdp")
        for dp in (1, 2)
        for packed in (True, False)
    ),
    *(FsdpLayout(strategy, sp=2) for strategy in ("fsdp2", "fsdp")),
    FsdpLayout("fsdp", 2, fused="torch"),
    FsdpLayout("fsdp", 2, fused="triton"),
    FsdpLayout("fsdp", 2, packed=False, fused="torch"),
    FsdpLayout("fsdp", sp=2, fused="torch"),
]


@pytest.fixture(scope="module")
def references(tiny_qwen2) -> dict[float, Reference]:
    results = {temperature: make_reference(tiny_qwen2, temperature) for temperature in (1.0, 0.7)}
    for result in results.values():
        check_meaningful(result)
    return results


@pytest.fixture(scope="module")
def tied_qwen2(tmp_path_factory) -> tuple[str, Reference]:
    path = make_tiny_model(tmp_path_factory.mktemp("tied-qwen2"), tie_word_embeddings=True)
    reference = make_reference(path, 1.0)
    check_meaningful(reference)
    return path, reference


@pytest.mark.parametrize(
    ("layout", "temperature"),
    [
        *((layout, 1.0) for layout in LAYOUTS),
        *(
            (layout, 0.7)
            for layout in (
                FsdpLayout(dp=2),
                FsdpLayout("fsdp", packed=False),
                FsdpLayout("fsdp", fused="torch"),
            )
        ),
    ],
    ids=str,
)
def test_training_equals_hugging_face_with_the_float64_filter(
    layout, temperature, references, tiny_qwen2
):
    ranks = run_on_ranks(
        train,
        layout.world_size,
        layout,
        tiny_qwen2,
        "capo",
        KNOBS,
        temperature,
        preload=ENGINE_MODULES,
    )
    check_training(ranks, layout.dp, references[temperature])
    for rank in ranks[1:]:
        assert torch.equal(rank["state"]["exp_avg"], ranks[0]["state"]["exp_avg"])


@pytest.mark.parametrize(
    "layout",
    [
        FsdpLayout("fsdp2", 2, fused="torch"),
        FsdpLayout("fsdp2", packed=False, fused="torch"),
        FsdpLayout(sp=2, fused="triton"),
    ],
    ids=str,
)
def test_tied_embeddings_with_fused_kernels(layout, tied_qwen2):
    path, reference = tied_qwen2
    ranks = run_on_ranks(
        train, layout.world_size, layout, path, "capo", KNOBS, preload=ENGINE_MODULES
    )
    for rank in ranks:  # exported under both names
        assert torch.equal(
            rank["weights"].pop("lm_head.weight"), rank["weights"]["model.embed_tokens.weight"]
        )
    check_training(ranks, layout.dp, reference)


@pytest.mark.parametrize("layout", [FsdpLayout(dp=2), FsdpLayout("fsdp", sp=2)], ids=str)
def test_experts(layout, tmp_path):
    path = make_tiny_model(tmp_path, "qwen3_moe")
    reference = make_reference(path, 1.0)
    check_meaningful(reference)
    ranks = run_on_ranks(
        train, 2, layout, path, "capo", KNOBS, preload=ENGINE_MODULES
    )  # fmt: skip
    check_training(ranks, layout.dp, reference)


def test_fsdp_decides_like_megatron(tiny_qwen2):
    ours = run_on_ranks(
        train, 2, FsdpLayout(dp=2), tiny_qwen2, "capo", KNOBS, preload=ENGINE_MODULES
    )
    theirs = run_on_ranks(
        megatron.train, 2, Layout(tp=2), tiny_qwen2, "capo", KNOBS,
        preload=ENGINE_MODULES,
    )  # fmt: skip
    for a, b in zip(ours[0]["reports"], theirs[0]["reports"], strict=True):
        assert a["capo/accepted_tokens"] == b["capo/accepted_tokens"]
        assert a["capo/objective_shift_p90"][0] == pytest.approx(
            b["capo/objective_shift_p90"][0], rel=1e-3
        )
    moments = torch.cat([rank["state"]["exp_avg"] for rank in theirs])
    torch.testing.assert_close(ours[0]["state"]["exp_avg"], moments, rtol=1e-3, atol=1e-7)


def test_padding_to_a_bucket_changes_nothing(references, tiny_qwen2):
    bucket = {"pad_to_length": True, "pad_to_length_bucket": 32}
    ranks = run_on_ranks(
        train, 2, FsdpLayout(dp=2), tiny_qwen2, "capo", KNOBS, preload=ENGINE_MODULES, **bucket
    )
    check_training(ranks, 2, references[1.0])


@pytest.mark.parametrize(
    "layout",
    [
        FsdpLayout(dp=2),
        FsdpLayout("fsdp"),
        FsdpLayout("fsdp", 2),
        FsdpLayout("fsdp", 2, fused="torch"),
    ],
    ids=str,
)
def test_lora(layout, tiny_qwen2, tmp_path):
    """The LM head is frozen; its moments are those of the gradient that it would have had."""
    adapter = write_adapter(tiny_qwen2, str(tmp_path))
    reference = make_reference(tiny_qwen2, 1.0, adapter)
    check_meaningful(reference)
    ranks = run_on_ranks(
        train, layout.world_size, layout, tiny_qwen2, "capo", KNOBS, preload=ENGINE_MODULES,
        model={"lora_rank": 4, "lora_alpha": 8, "lora_adapter_path": adapter},
    )  # fmt: skip
    check_training(ranks, layout.dp, reference)


@pytest.mark.parametrize(
    "layout",
    [FsdpLayout(dp=2), FsdpLayout("fsdp", packed=False), FsdpLayout("fsdp", 2, fused="torch")],
    ids=str,
)
def test_without_the_switch_it_is_verls_engine_bit_for_bit(layout, tiny_qwen2):
    ours, verls = (
        run_on_ranks(
            train,
            layout.world_size,
            layout,
            tiny_qwen2,
            "vanilla",
            None,
            own_engine=own,
            preload=ENGINE_MODULES,
        )
        for own in (True, False)
    )
    check_untouched(ours, verls)


def test_tracking_trains_bit_for_bit_like_no_switch_and_measures(tiny_qwen2):
    tracked, plain = (
        run_on_ranks(
            train, 2, FsdpLayout(dp=2), tiny_qwen2, "vanilla", knobs, preload=ENGINE_MODULES
        )
        for knobs in ({**KNOBS, "mode": "track"}, None)
    )
    for a, b in zip(tracked, plain, strict=True):
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    assert all(0 < report["capo/rejection_rate"][0] <= 1 for report in tracked[0]["reports"])


@pytest.mark.parametrize("layout", [FsdpLayout(), FsdpLayout("fsdp", fused="torch")], ids=str)
def test_the_filter_does_not_run_under_autocast(layout, tiny_qwen2):
    """verl's forward pass does; the decisions are those of float64 on the logits that it made."""
    ((found, expected, dtype),) = run_on_ranks(
        filter_under_autocast, 1, layout, tiny_qwen2, preload=ENGINE_MODULES
    )
    assert dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("layout", [FsdpLayout(dp=2), FsdpLayout("fsdp", sp=2)], ids=str)
@pytest.mark.parametrize("where", ["advantages", "gradient", "weight"])
def test_all_ranks_stop_when_one_meets_nan(where, layout, tiny_qwen2):
    place = {
        "advantages": "rank 1: advantages are not finite, first in sample",
        "gradient": "rank 0: gradients are not finite",
        "weight": "rank 1: hidden_states are not finite",
    }[where]
    first, second = run_on_ranks(stops, 2, layout, tiny_qwen2, [where], preload=ENGINE_MODULES)
    assert first == second
    assert place in first[0] and "Nothing was updated." in first[0]


def test_a_rank_without_parameter_groups_is_refused_on_all_ranks(tiny_qwen2):
    ranks = run_on_ranks(
        without_parameter_groups, 2, FsdpLayout(dp=2), tiny_qwen2, preload=ENGINE_MODULES
    )
    assert ranks[0] == ranks[1]
    assert "the optimizer has no parameter groups on rank 1, so" in ranks[0][0] and not ranks[0][1]


def test_a_skipped_batch_leaves_no_trace(tiny_qwen2):
    for plain, skipped in run_on_ranks(
        with_and_without, 2, FsdpLayout(dp=2), tiny_qwen2, preload=ENGINE_MODULES
    ):
        assert skipped["reports"][1] == {"skipped": [1.0], "grad_norm": 0.0}
        assert plain["reports"] == [skipped["reports"][0], skipped["reports"][2]]
        assert all(
            torch.equal(plain["weights"][name], skipped["weights"][name])
            for name in plain["weights"]
        )
        assert torch.equal(plain["moments"]["exp_avg_sq"], skipped["moments"]["exp_avg_sq"])
