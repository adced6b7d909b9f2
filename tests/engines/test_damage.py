# SPDX-License-Identifier: Apache-2.0
"""Damage to a saved state, and a disk without room for it, under both engines: refused or told on
every rank, by a sentence that names the file.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.damage_cases import (
    flip_header,
    is_refusal,
    outcomes,
    save,
    saves_without_room,
)
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

pytestmark = pytest.mark.ranks

MEGATRON, FSDP = Layout(tp=2), FsdpLayout("fsdp", 2)
BITS = (0, 1, 2, 20, 62)
"""Of 2 they make 3, 0, 6, 1,048,578 and 4.6e18."""
DAMAGED = "its checksum does not fit: the files were damaged after they were written"


@pytest.fixture(scope="module")
def saved(tiny_qwen2: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("saved")

    def of(layout: Layout | FsdpLayout) -> Path:
        path = folder / type(layout).__name__
        if not path.exists():
            run_on_ranks(save, 2, layout, tiny_qwen2, str(path), preload=ENGINE_MODULES)
        return path

    return of


def check(
    layout: Layout | FsdpLayout,
    model: str,
    copies: Path,
    saved: Path,
    ways: dict[str, tuple[Callable[[Path], object], str]],
) -> None:
    """Every way to damage a copy of ``saved`` is refused for its reason, on both ranks alike."""
    for name, (damage, _) in ways.items():
        shutil.copytree(saved, copies / name)
        damage(copies / name / "capo")
    paths = [str(copies / name) for name in ways]
    first, second = run_on_ranks(
        outcomes, 2, layout, model, [*paths, str(saved)], preload=ENGINE_MODULES
    )
    assert first == second and first.pop() == ("same", "")
    for (name, (_, reason)), (said, _) in zip(ways.items(), first, strict=True):
        assert is_refusal(said, copies / name) and re.search(reason, said), f"{name}: {said}"


def pickled(folder: Path) -> bytes:
    """What torch refuses to load, as long as the file which it takes the place of."""
    data = pickle.dumps(re.compile("a"))
    return data + bytes((folder / "dist_ckpt/__0_0.distcp").stat().st_size - len(data))


def test_megatron(saved, tiny_qwen2, tmp_path):
    def gone(name: str) -> Callable[[Path], object]:
        return lambda folder: (folder / "dist_ckpt" / name).unlink()

    ways: dict[str, tuple[Callable[[Path], object], str]] = {
        f"step-bit-{bit}": (lambda folder, bit=bit: flip_header(folder, 0, bit), DAMAGED)
        for bit in BITS
    }
    ways |= {
        "vocabulary": (lambda folder: flip_header(folder, 1, 3), "saved for a vocabulary of 136"),
        "hidden-size": (lambda folder: flip_header(folder, 2, 0), "hidden size 65, this model has"),
        "no-index": (gone(".metadata"), r"FileNotFoundError: .*\.metadata"),
        "no-kind": (gone("metadata.json"), r"FileNotFoundError: .*metadata\.json"),
        "no-tensors": (gone("__0_0.distcp"), r"FileNotFoundError: .*__0_0\.distcp"),
        "common-cut": (
            lambda folder: (folder / "dist_ckpt/common.pt").write_bytes(b"PK"),
            r"common\.pt is damaged, or holds more than tensors",
        ),
        "common-code": (
            lambda folder: torch.save(re.compile("a"), folder / "dist_ckpt/common.pt"),
            r"common\.pt is damaged, or holds more than tensors",
        ),
        "common-list": (
            lambda folder: torch.save([1], folder / "dist_ckpt/common.pt"),
            r"common\.pt holds no table",
        ),
        "tensors-code": (
            lambda folder: (folder / "dist_ckpt/__0_0.distcp").write_bytes(pickled(folder)),
            # Megatron-Core >= 0.19 looks for a table in it first.
            r"UnpicklingError: a file is damaged, or holds more than tensors|Invalid magic number",
        ),
    }
    whole = saved(MEGATRON)
    if (whole / "capo/dist_ckpt/common.pt").exists():  # Megatron-Core < 0.19
        ways["no-common"] = (gone("common.pt"), r"FileNotFoundError: .*common\.pt")
    check(MEGATRON, tiny_qwen2, tmp_path, whole, ways)


@pytest.mark.parametrize(
    ("index", "common", "refusal"),
    [
        ("common_state/shard_0_1", None, ""),  # as Megatron-Core 0.19 writes it
        ("common_state/shard_0_1", [1], r"common\.pt holds no table"),  # which it would read
        ("rng_state", {}, ""),
        ("rng_state", None, r"No such file .*common\.pt"),
    ],
)
def test_what_is_no_tensor_is_in_a_file_or_among_the_tensors(tmp_path, index, common, refusal):
    from capo_verl.engines.megatron import checkpoint

    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / ".metadata").write_bytes(pickle.dumps({index: 0}))
    if common is not None:
        torch.save(common, tmp_path / "common.pt")
    with pytest.raises((OSError, ValueError), match=refusal) if refusal else nullcontext():
        checkpoint._check_files(tmp_path)


def rewrite(folder: Path, change: Callable[[dict, dict], object]) -> None:
    """Write the tensors and the header again, after a change that a bit cannot make."""
    path = folder / "moments.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def swap(table: dict, one: str, other: str) -> None:
    table[one], table[other] = table[other], table[one]


def test_fsdp(saved, tiny_qwen2, tmp_path):
    def step(value: str) -> Callable[[Path], object]:
        return lambda folder: rewrite(folder, lambda _, metadata: metadata.update(step=value))

    def transposed(tensors: dict, _: dict) -> None:
        tensors |= {name: tensor.T.contiguous() for name, tensor in tensors.items()}

    def swapped(tensors: dict, metadata: dict) -> None:
        swap(tensors, "exp_avg", "exp_avg_sq")
        swap(metadata, "checksum.exp_avg", "checksum.exp_avg_sq")

    ways = {f"step-bit-{bit}": (step(str(2 ^ (1 << bit))), DAMAGED) for bit in BITS}
    ways |= {
        "step-text": (step("two"), "ValueError: invalid literal"),
        "no-step": (
            lambda folder: rewrite(folder, lambda _, metadata: metadata.pop("step")),
            r"its header does not hold step, checksum\.exp_avg, checksum\.exp_avg_sq",
        ),
        "more": (
            lambda folder: rewrite(folder, lambda _, metadata: metadata.update(other="1")),
            "its header does not hold",
        ),
        "shape": (
            lambda folder: rewrite(folder, transposed),
            "saved for a vocabulary of 64 and hidden size 128",
        ),
        "swapped": (lambda folder: rewrite(folder, swapped), DAMAGED),
        "no-tensors": (
            lambda folder: (folder / "moments.safetensors").unlink(),
            r"FileNotFoundError: .*moments\.safetensors",
        ),
    }
    check(FSDP, tiny_qwen2, tmp_path, saved(FSDP), ways)


@pytest.mark.parametrize(("layout", "rank"), [(MEGATRON, 0), (MEGATRON, 1), (FSDP, 0)], ids=str)
def test_a_disk_without_room_is_told_on_every_rank(layout, rank, tiny_qwen2, tmp_path):
    folder = tmp_path / "global_step_2/actor"
    state = "dist_ckpt" if layout is MEGATRON else "moments.safetensors"
    ranks = run_on_ranks(
        saves_without_room, 2, layout, tiny_qwen2, str(folder), rank, preload=ENGINE_MODULES,
        timeout=120,
    )  # fmt: skip
    assert ranks[0] == ranks[1]
    assert re.fullmatch(
        rf"the checkpoint {folder} was not saved: {folder}/capo/{state} cannot be written \(.*File "
        r"too large.*\); free disk space or change the folder's permissions, then resume from the "
        "one before",
        ranks[0]["said"],
    )
    assert ranks[0]["left"] == "True" and ranks[0]["before"] == ranks[0]["again"] == "same"


def test_a_folder_that_is_a_file_is_told(tiny_qwen2, tmp_path):
    """Of the few numbers beside the moments, which the first rank writes."""
    (tmp_path / "capo").write_text("in the way")
    ranks = run_on_ranks(save_control, 2, str(tmp_path), preload=ENGINE_MODULES)
    assert ranks[0] == ranks[1]
    assert f"{tmp_path}/capo/control.json cannot be written (" in ranks[0]


def save_control(checkpoint: str) -> str:
    from capo_verl.engines import checkpoint_files

    try:
        checkpoint_files.save(checkpoint, checkpoint_files.Control(True, None, {}))
    except RuntimeError as e:
        return str(e)
    return "saved"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.update(moments="yes"), "moments is not true or false"),
        (lambda table: table.update(moments=None), "moments is not true or false"),
        (lambda table: table.update(kl_budget=[1.0]), "kl_budget or filter no table"),
        (lambda table: table.update(filter=None), "kl_budget or filter no table"),
        (lambda table: table.update(other=1), "it holds something else than filter, kl_budget"),
        (lambda table: table.pop("filter"), "missing: filter"),
    ],
)
def test_a_table_with_a_valid_hash_is_looked_at(change, reason, tmp_path):
    """Written by something else than this package, or by hand."""
    from capo_verl.engines.checkpoint_files import Control, _read, _sum

    table = Control(True, {"scale": 0.5}, {"policy_threshold": 1e-4})._asdict()
    change(table)
    path = tmp_path / "control.json"
    path.write_text(json.dumps({"version": 1, **table, "sha256": _sum(table)}))
    with pytest.raises((ValueError, KeyError), match=reason):
        _read(path)
