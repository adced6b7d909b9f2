# SPDX-License-Identifier: Apache-2.0
"""CAPO's moments in Megatron's distributed checkpoint, under ``<checkpoint>/capo/dist_ckpt``.

Every row is stored once, by the last pipeline stage, with its global position, so a run can be
resumed under another layout. A checksum that does not depend on the layout tells whether the
moments arrived as they were written.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from verl.utils.device import get_device_id
from verl.utils.megatron.dist_checkpointing import load_dist_checkpointing, save_dist_checkpointing

from capo_verl.core.checksum import checksum
from capo_verl.engines.checkpoint import State
from capo_verl.engines.checkpoint_files import MOMENTS, check_model, check_undamaged, unusable
from capo_verl.engines.megatron.safe_metadata import check_metadata


def directory(checkpoint: str) -> str:
    return os.path.join(checkpoint, "capo", "dist_ckpt")


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
    """
    path = directory(checkpoint)
    os.makedirs(path, exist_ok=True)
    torch.distributed.barrier()
    if state:
        device = torch.device(
            get_device_id()
        )  # of the collectives; offloaded moments are elsewhere
        state = {**state, **{name: state[name].to(device) for name in MOMENTS}}
        header = [state["step"], vocab_size, state["exp_avg"].shape[1]]
        state = {
            **state,
            "header": torch.tensor(header, device=device),
            "checksum": _checksum(state),
        }
    save_dist_checkpointing(_sharded(state), path)
    torch.distributed.barrier()


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
    if not os.path.isdir(path):
        return None
    state, problem = {}, ""
    try:
        check_metadata(Path(path, ".metadata"))
        state = _load(path, rows, hidden_size, vocab_size)
    except (
        Exception,
        CheckpointException,
    ) as e:  # whatever the reason: all ranks have to learn of it before one stops
        problem = _reason(e)
    problems: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    if any(problems):
        raise unusable(Path(path), next(p for p in problems if p))
    return state


def _reason(e: BaseException) -> str:
    """The reason on one line: torch wraps each rank's, with traceback, into an exception."""
    if isinstance(e, CheckpointException) and e.failures:
        e = next(iter(e.failures.values()))[0]
    return f"{type(e).__name__}: {' '.join(str(e).split())}"


def _load(path: str, rows: int, hidden_size: int, vocab_size: int) -> State:
    template: State = {}
    if rows:
        device = torch.device(get_device_id())
        template = {name: torch.zeros(rows, hidden_size, device=device) for name in MOMENTS}
        template |= {"header": torch.zeros(3, dtype=torch.int64, device=device)}
        template |= {"checksum": torch.zeros(2, dtype=torch.int64, device=device)}
    loaded = load_dist_checkpointing(_sharded(template), path)
    if not rows:
        return {}
    state = loaded["capo"]
    step, saved_vocabulary, saved_hidden = state.pop("header").tolist()
    check_model((saved_vocabulary, saved_hidden), (vocab_size, hidden_size))
    saved = state.pop("checksum")
    check_undamaged(torch.equal(_checksum(state), saved))
    return {**state, "step": step}


def _checksum(state: State) -> torch.Tensor:
    group, rank = mpu.get_tensor_model_parallel_group(), mpu.get_tensor_model_parallel_rank()
    return torch.stack([checksum(state[name], rank * len(state[name]), group) for name in MOMENTS])


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
