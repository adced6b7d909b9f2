# SPDX-License-Identifier: Apache-2.0
"""CAPO's moments in checkpoints of the FSDP engine: resumed bit-exactly, from a run without CAPO,
refused if damaged.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.engines.megatron.capo_cases import KNOBS
from tests.engines.megatron.state_cases import in_turn, load_only, refusals, resume, save_and_go_on
from tests.engines.megatron.test_state import check_bit_exact
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

SAVED = FsdpLayout(dp=2)


def on_ranks(function: Callable, layout: FsdpLayout, *args: object) -> list:
    return run_on_ranks(function, layout.world_size, layout, *args, preload=ENGINE_MODULES)


@pytest.fixture(scope="module")
def checkpoint(tiny_qwen2, tmp_path_factory) -> tuple[Path, list[dict]]:
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    return path, on_ranks(in_turn, SAVED, tiny_qwen2, str(path), None)


def test_resuming_continues_bit_exactly(checkpoint):
    check_bit_exact(checkpoint[1])


@pytest.mark.parametrize(
    "layout",
    [
        FsdpLayout("fsdp", 2),
        FsdpLayout("fsdp", packed=False),
        FsdpLayout(sp=2),
        FsdpLayout(dp=2, lora_rank=4),
    ],
    ids=str,
)
def test_resuming_other_layouts_continues_bit_exactly(layout, tiny_qwen2, tmp_path):
    check_bit_exact(on_ranks(in_turn, layout, tiny_qwen2, str(tmp_path), None))


def test_a_run_without_capo_goes_on_with_it(tiny_qwen2, tmp_path):
    path = str(tmp_path / "checkpoint")
    on_ranks(save_and_go_on, FsdpLayout(), tiny_qwen2, path, None)
    assert not Path(path, "capo").exists()
    (resumed,) = on_ranks(resume, FsdpLayout(), tiny_qwen2, path, KNOBS)
    assert resumed["moments"]["step"] == 1
    assert (
        f"the checkpoint {path} was written without CAPO: its moments start empty"
        in resumed["said"]
    )


def test_damaged_and_foreign_states_are_refused_on_every_rank(checkpoint, tiny_qwen2, tmp_path):
    def copy(name: str, damage: Callable[[Path], object]) -> str:
        shutil.copytree(checkpoint[0] / "capo", tmp_path / name / "capo")
        damage(tmp_path / name / "capo/moments.safetensors")
        return str(tmp_path / name)

    def other_model(path: Path) -> None:
        save_file({name: tensor[:-1].clone() for name, tensor in load_file(path).items()}, path)

    reasons = {
        copy("short", lambda path: path.write_bytes(path.read_bytes()[:-100])): "SafetensorError",
        copy(
            "bit", lambda path: path.write_bytes(_flip_last_bit(path.read_bytes()))
        ): "its checksum does not fit",
        copy(
            "other", other_model
        ): "saved for a vocabulary of 127 and hidden size 64, this model has 128 and 64",
        copy("empty", Path.unlink): "FileNotFoundError",
    }
    for said in on_ranks(refusals, SAVED, tiny_qwen2, [*reasons, str(checkpoint[0])]):
        assert said.pop() == "loaded"
        for message, (path, reason) in zip(said, reasons.items(), strict=True):
            assert f"the CAPO state in {path}/capo/moments.safetensors cannot be used (" in message
            assert reason in message and "to start with empty moments" in message


def _flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_any_number_of_ranks_reads_the_moments(checkpoint, tiny_qwen2):
    saved = checkpoint[1][0]["uninterrupted"]["saved"]
    alone = on_ranks(load_only, FsdpLayout("fsdp"), tiny_qwen2, str(checkpoint[0]))[0]["moments"]
    assert alone["step"] == saved["step"] == 2
    assert torch.equal(alone["exp_avg"], saved["exp_avg"]) and torch.equal(
        alone["exp_avg_sq"], saved["exp_avg_sq"]
    )
