# SPDX-License-Identifier: Apache-2.0
"""CAPO inside verl's FSDP engine on gloo ranks, against Hugging Face + the filter in float64 + torch's AdamW.

The reference is the one of the Megatron engine, same model and batch, so the two engines agree as well.
"""

from __future__ import annotations

import pytest
import torch

from tests.cpu.engine_cases import Layout
from tests.cpu.fsdp_cases import FsdpLayout, write_adapter
from tests.fsdp.capo_cases import load_damaged, train, train_save_resume, train_with_nan
from tests.helpers.spawn import run_on_ranks
from tests.megatron import capo_cases as megatron
from tests.megatron.capo_cases import KNOBS
from tests.megatron.capo_reference import Reference, check_meaningful, check_resumed, check_training, make_reference

PRELOAD = ("torch", "verl.workers.engine.fsdp.transformer_impl")
LAYOUTS = [
    *(FsdpLayout(strategy, dp, packed) for strategy in ("fsdp2", "fsdp") for dp in (1, 2) for packed in (True, False)),
    *(FsdpLayout(strategy, sp=2) for strategy in ("fsdp2", "fsdp")),
]


@pytest.fixture(scope="module")
def references(tiny_qwen2) -> dict[float, Reference]:
    results = {temperature: make_reference(tiny_qwen2, temperature) for temperature in (1.0, 0.7)}
    for result in results.values():
        check_meaningful(result)
    return results


@pytest.mark.parametrize(
    ("layout", "temperature"),
    [*((layout, 1.0) for layout in LAYOUTS), (FsdpLayout(dp=2), 0.7), (FsdpLayout("fsdp", packed=False), 0.7)],
    ids=str,
)
def test_training_equals_hugging_face_with_the_float64_filter(layout, temperature, references, tiny_qwen2):
    ranks = run_on_ranks(train, layout.world_size, layout, tiny_qwen2, "capo", KNOBS, temperature, preload=PRELOAD)
    check_training(ranks, layout.dp, references[temperature])
    for rank in ranks[1:]:
        assert torch.equal(rank["state"]["exp_avg"], ranks[0]["state"]["exp_avg"])


def test_fsdp_decides_like_megatron(tiny_qwen2):
    ours = run_on_ranks(train, 2, FsdpLayout(dp=2), tiny_qwen2, "capo", KNOBS, preload=PRELOAD)
    theirs = run_on_ranks(
        megatron.train, 2, Layout(tp=2), tiny_qwen2, "capo", KNOBS,
        preload=("torch", "verl.workers.engine.megatron.transformer_impl", "capo_verl.cpu.bridge"),
    )  # fmt: skip
    for a, b in zip(ours[0]["reports"], theirs[0]["reports"], strict=True):
        assert a["capo/accepted_tokens"] == b["capo/accepted_tokens"]
        assert a["capo/objective_shift_p90"][0] == pytest.approx(b["capo/objective_shift_p90"][0], rel=1e-3)
    moments = torch.cat([rank["state"]["exp_avg"] for rank in theirs])
    torch.testing.assert_close(ours[0]["state"]["exp_avg"], moments, rtol=1e-3, atol=1e-7)


def test_padding_to_a_bucket_changes_nothing(references, tiny_qwen2):
    bucket = {"pad_to_length": True, "pad_to_length_bucket": 32}
    ranks = run_on_ranks(train, 2, FsdpLayout(dp=2), tiny_qwen2, "capo", KNOBS, preload=PRELOAD, **bucket)
    check_training(ranks, 2, references[1.0])


@pytest.mark.parametrize("layout", [FsdpLayout(dp=2), FsdpLayout("fsdp"), FsdpLayout("fsdp", 2)], ids=str)
def test_lora(layout, tiny_qwen2, tmp_path):
    """The LM head is frozen; its moments are those of the gradient that it would have had."""
    adapter = write_adapter(tiny_qwen2, str(tmp_path))
    reference = make_reference(tiny_qwen2, 1.0, adapter)
    check_meaningful(reference)
    ranks = run_on_ranks(
        train, layout.world_size, layout, tiny_qwen2, "capo", KNOBS, preload=PRELOAD,
        model={"lora_rank": 4, "lora_alpha": 8, "lora_adapter_path": adapter},
    )  # fmt: skip
    check_training(ranks, layout.dp, reference)


@pytest.mark.parametrize("layout", [FsdpLayout(dp=2), FsdpLayout("fsdp", packed=False)], ids=str)
def test_without_the_switch_it_is_verls_engine_bit_for_bit(layout, tiny_qwen2):
    ours, verls = (
        run_on_ranks(train, layout.world_size, layout, tiny_qwen2, "vanilla", None, own_engine=own, preload=PRELOAD)
        for own in (True, False)
    )
    for a, b in zip(ours, verls, strict=True):
        assert a["weights"].keys() == b["weights"].keys()
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
        assert [r["loss"] for r in a["reports"]] == [r["loss"] for r in b["reports"]]
        assert a["state"] is None and not any("capo/" in name for report in a["reports"] for name in report)


def test_tracking_trains_bit_for_bit_like_no_switch_and_measures(tiny_qwen2):
    tracked, plain = (
        run_on_ranks(train, 2, FsdpLayout(dp=2), tiny_qwen2, "vanilla", knobs, preload=PRELOAD)
        for knobs in ({**KNOBS, "mode": "track"}, None)
    )
    for a, b in zip(tracked, plain, strict=True):
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    assert all(0 < report["capo/rejection_rate"][0] <= 1 for report in tracked[0]["reports"])


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("layout", [FsdpLayout(dp=2), FsdpLayout("fsdp", 2), FsdpLayout("fsdp", packed=False)], ids=str)
def test_resuming_continues_bit_exactly(layout, lora_rank, tiny_qwen2, tmp_path):
    ranks = run_on_ranks(
        train_save_resume, layout.world_size, layout, tiny_qwen2, str(tmp_path), model={"lora_rank": lora_rank},
        preload=PRELOAD,
    )  # fmt: skip
    assert all(rank["uninterrupted"][2]["exp_avg"].any() for rank in ranks)
    check_resumed(ranks)


def test_damaged_moments_are_refused_on_every_rank(tiny_qwen2, tmp_path):
    for said in run_on_ranks(load_damaged, 2, tiny_qwen2, str(tmp_path), preload=PRELOAD):
        assert said["as written"] == "loaded"
        for name, reason in {
            "cut short": "SafetensorError",
            "one bit": "its checksum does not fit",
            "other model": "saved for a vocabulary of 127 and hidden size 64, this model has 128 and 64",
            "missing": "FileNotFoundError",
        }.items():
            assert reason in said[name] and "to start with empty moments" in said[name], name


@pytest.mark.parametrize("on_nonfinite", ["error", "skip_batch"])
def test_all_ranks_stop_or_skip_when_one_meets_nan(on_nonfinite, tiny_qwen2):
    for error, moved, moments_stayed in run_on_ranks(train_with_nan, 2, tiny_qwen2, on_nonfinite, preload=PRELOAD):
        assert moved == 0.0 and moments_stayed
        assert ("rank 1: " in error and "first in sample 1" in error) == (on_nonfinite == "error")
