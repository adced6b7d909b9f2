# SPDX-License-Identifier: Apache-2.0
"""CAPO's moments in Megatron's distributed checkpoint, under ``<checkpoint>/capo/dist_ckpt``.

Every row is stored once, by the last pipeline stage, with its global position, so a run can be resumed under another
layout. Nothing is pickled: the state is tensors only.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor
from verl.utils.megatron.dist_checkpointing import load_dist_checkpointing, save_dist_checkpointing

State = dict[str, Any]
"""``CapoFilter.state_dict()``; empty on ranks that hold no LM head."""


def directory(checkpoint: str) -> str:
    return os.path.join(checkpoint, "capo", "dist_ckpt")


def save(checkpoint: str, state: State) -> None:
    """Write the moments. Collective over all ranks.

    Args:
        state: this rank's rows; empty if it holds none.
    """
    path = directory(checkpoint)
    os.makedirs(path, exist_ok=True)
    torch.distributed.barrier()
    save_dist_checkpointing(_sharded(state), path)
    torch.distributed.barrier()


def load(checkpoint: str, rows: int, hidden_size: int) -> State | None:
    """Read this rank's rows. Collective over all ranks.

    Args:
        rows, hidden_size: shape of this rank's shard of the LM head; ``rows = 0`` on ranks without.

    Returns:
        The state (empty with ``rows = 0``), or None if the checkpoint holds none: it was written without CAPO.

    Raises:
        RuntimeError: if it holds one that cannot be read.
    """
    path = directory(checkpoint)
    if not os.path.isdir(path):
        return None
    shape = (rows, hidden_size)
    template: State = {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape), "step": 0} if rows else {}
    try:
        loaded = load_dist_checkpointing(_sharded(template), path)
    except Exception as e:
        raise RuntimeError(
            f"the CAPO state in {path} cannot be read ({type(e).__name__}: {e}); resume from another checkpoint, or remove "
            f"the directory {os.path.dirname(path)} to start with empty moments"
        ) from e
    if not rows:
        return {}
    state = loaded["capo"]
    return {**state, "step": int(state["step"])}


def _sharded(state: State) -> dict[str, Any]:
    if not state:
        return {}
    tp, replica = mpu.get_tensor_model_parallel_rank(), mpu.get_data_parallel_rank(with_context_parallel=True)
    tp_size = mpu.get_tensor_model_parallel_world_size()

    def rows(name: str) -> ShardedTensor:
        # The padding of the vocabulary depends on the tensor-parallel size, hence the mismatch is allowed.
        return ShardedTensor.from_rank_offsets(
            f"capo.{name}", state[name], (0, tp, tp_size), replica_id=replica, allow_shape_mismatch=True
        )

    step: Tensor = torch.tensor([state["step"]], dtype=torch.int64, device=state["exp_avg"].device)
    return {
        "capo": {
            "exp_avg": rows("exp_avg"),
            "exp_avg_sq": rows("exp_avg_sq"),
            "step": ShardedTensor.from_rank_offsets("capo.step", step, replica_id=(tp, replica)),
        }
    }
