# SPDX-License-Identifier: Apache-2.0
"""CAPO's moments in Megatron's distributed checkpoint, under ``<checkpoint>/capo/dist_ckpt``.

Every row is stored once, by the last pipeline stage, with its global position, so a run can be
resumed under another layout. A checksum that does not depend on the layout tells whether the
moments arrived as they were written.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import ShardedTensor
from verl.utils.device import get_device_id
from verl.utils.megatron.dist_checkpointing import load_dist_checkpointing, save_dist_checkpointing

from capo_verl.core.checksum import checksum
from capo_verl.engines.checkpoint import State
from capo_verl.engines.checkpoint_files import (
    MOMENTS,
    Header,
    check_model,
    check_undamaged,
    gathered,
    not_saved,
    sealed,
    together,
    unusable,
)
from capo_verl.engines.megatron.safe_metadata import check_metadata

COMMON = "common.pt"
"""The file of what is no tensor; of Megatron-Core < 0.19."""
SOLITARY = (COMMON, ".metadata", "metadata.json")
"""Files that the first rank writes and every rank reads."""
SLACK = 1 << 20
"""Bytes of a rank's files beside the moments: indices, headers of archives."""


def directory(checkpoint: str) -> Path:
    return Path(checkpoint, "capo", "dist_ckpt")


def layout_of_random_states(checkpoint: str) -> tuple[int, int] | None:
    """``(pipeline, tensor)`` sizes under which verl saved Megatron's random states; None if it
    saved none.

    Read from their names in the index, ``rng_state/shard_<pp>.<tp>_<sizes>``
    (``megatron_checkpoint_manager.py``, ``get_rng_state``), without unpickling it.
    """
    index = Path(checkpoint, "extra", "dist_ckpt", ".metadata")
    found = (
        re.search(rb"rng_state/shard_\d+\.\d+_(\d+)\.(\d+)", index.read_bytes())
        if index.exists()
        else None
    )
    return (int(found[1]), int(found[2])) if found else None


def save(checkpoint: str, state: State, vocab_size: int) -> None:
    """Write the moments. Collective over all ranks.

    Args:
        state: this rank's rows; empty if it holds none.

    Raises:
        RuntimeError: on every rank, if they cannot be written.
    """
    path = directory(checkpoint)
    # Megatron lets the first rank write some files alone; failing at them, it would leave the
    # others in their next collective. So the room is there before anything is written.
    size = sum(state[name].nbytes for name in MOMENTS) if state else 0
    room = together(lambda: _reserve(path, size), path, not_saved)
    assert room is not None
    room.close()
    if state:
        device = torch.device(
            get_device_id()
        )  # of the collectives; offloaded moments are elsewhere
        state = {**state, **{name: state[name].to(device) for name in MOMENTS}}
        header = Header(state["step"], vocab_size, state["exp_avg"].shape[1])
        state = {
            **state,
            "header": torch.tensor(header, device=device),
            "checksum": torch.tensor(sealed(_checksums(state), header), device=device),
        }
    together(lambda: save_dist_checkpointing(_sharded(state), str(path)), path, not_saved)


def _reserve(path: Path, size: int) -> IO[bytes]:
    """Take the room that this rank is going to write to, until the file is closed.

    Args:
        size: bytes of its rows, which its data-parallel replicas share.

    Raises:
        OSError: if there is none.
    """
    path.mkdir(parents=True, exist_ok=True)
    if torch.distributed.get_rank() == 0:
        for name in SOLITARY:
            if Path(path, name).exists():  # of an attempt that did not end
                Path(path, name).open("ab").close()
    file = tempfile.TemporaryFile(dir=path)  # noqa: SIM115  closed once all ranks hold theirs
    replicas = mpu.get_data_parallel_world_size(with_context_parallel=True)
    os.posix_fallocate(file.fileno(), 0, SLACK + size // replicas)
    return file


def load(checkpoint: str, rows: int, hidden_size: int, vocab_size: int) -> State | None:
    """Read this rank's rows. Collective over all ranks.

    Args:
        rows, hidden_size: shape of this rank's shard of the LM head; ``rows = 0`` on ranks without.
        vocab_size: V.

    Returns:
        The state (empty with ``rows = 0``), or None if the checkpoint holds none: it was written
        without CAPO.

    Raises:
        RuntimeError: on every rank, if it holds one that cannot be read, belongs to another model
            or is corrupt.
    """
    path = directory(checkpoint)
    if not any(gathered(path.is_dir())):
        return None
    together(lambda: _check_files(path), path, unusable)
    template: State = {}
    if rows:
        device = torch.device(get_device_id())
        template = {name: torch.zeros(rows, hidden_size, device=device) for name in MOMENTS}
        template |= {"header": torch.zeros(3, dtype=torch.int64, device=device)}
        template |= {"checksum": torch.zeros(2, dtype=torch.int64, device=device)}
    loaded = together(
        lambda: load_dist_checkpointing(_sharded(template), str(path)), path, unusable
    )
    assert loaded is not None
    model = (vocab_size, hidden_size)
    return together(lambda: _checked(loaded["capo"], model, path) if rows else {}, path, unusable)


def _check_files(path: Path) -> None:
    """Look at what every rank reads by itself, before they read together.

    Raises:
        Exception: naming the file that is missing or damaged.
    """
    present = {name: Path(path, name).read_bytes() for name in SOLITARY if name != COMMON}
    check_metadata(Path(path, ".metadata"))
    file = Path(path, COMMON)
    if b"common_state/shard" in present[".metadata"] and not file.exists():
        return  # Megatron-Core >= 0.19 keeps it among the tensors
    file.read_bytes()
    try:
        common = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:
        raise ValueError("common.pt is damaged, or holds more than tensors") from e
    if not isinstance(common, dict):
        raise ValueError("common.pt holds no table")


def _checked(state: State, model: tuple[int, int], path: Path) -> State:
    header = Header(*state.pop("header").tolist())
    check_model((header.vocab_size, header.hidden_size), model)
    check_undamaged(state.pop("checksum").tolist(), _checksums(state), header, path)
    return {**state, "step": header.step}


def _checksums(state: State) -> list[int]:
    group, rank = mpu.get_tensor_model_parallel_group(), mpu.get_tensor_model_parallel_rank()
    return [int(checksum(state[name], rank * len(state[name]), group)) for name in MOMENTS]


def _sharded(state: State) -> dict[str, Any]:
    if not state:
        return {}
    tp, replica = (
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_data_parallel_rank(with_context_parallel=True),
    )
    tp_size = mpu.get_tensor_model_parallel_world_size()

    def rows(name: str) -> ShardedTensor:
        # The padding of the vocabulary depends on the tensor-parallel size, hence the mismatch is
        # allowed.
        return ShardedTensor.from_rank_offsets(
            f"capo.{name}",
            state[name],
            (0, tp, tp_size),
            replica_id=replica,
            allow_shape_mismatch=True,
        )

    def same_everywhere(name: str) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(
            f"capo.{name}", state[name], replica_id=(tp, replica)
        )

    moments = {name: rows(name) for name in MOMENTS}
    return {
        "capo": {
            **moments,
            "header": same_everywhere("header"),
            "checksum": same_everywhere("checksum"),
        }
    }
