# SPDX-License-Identifier: Apache-2.0
"""CAPO's moments in a checkpoint of the FSDP engine: ``<checkpoint>/capo/moments.safetensors``,
tensors and a few strings.

Every rank holds the same moments, so the first one writes and reads them, for runs of any number of
ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from capo_verl.core.checksum import checksum
from capo_verl.engines import checkpoint_files
from capo_verl.engines.checkpoint import State
from capo_verl.engines.checkpoint_files import MOMENTS, check_model, check_undamaged, unusable


def path_of(checkpoint: str) -> Path:
    return Path(checkpoint, "capo", "moments.safetensors")


def save(checkpoint: str, state: State) -> None:
    """Write the moments. Collective over all ranks."""
    if dist.get_rank() == 0:
        path = path_of(checkpoint)
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = {name: state[name].cpu().contiguous() for name in MOMENTS}
        sums = {f"checksum.{name}": str(_checksum(moments[name])) for name in MOMENTS}
        save_file(moments, path, metadata={"step": str(state["step"]), **sums})
    dist.barrier()


def load(checkpoint: str, shape: tuple[int, int], device: torch.device) -> State | None:
    """Read the moments. Collective over all ranks.

    Args:
        shape: vocabulary and hidden size of this model.
        device: of the collectives.

    Returns:
        The state, on the CPU, or None if the checkpoint holds none: it was written without CAPO.

    Raises:
        RuntimeError: on every rank, if it holds one that cannot be read, belongs to another model
            or is corrupt.
    """
    path = path_of(checkpoint)
    state, problem = None, ""
    if (
        dist.get_rank() == 0
        and path.parent.is_dir()
        and not checkpoint_files.has_no_moments(checkpoint)
    ):
        try:
            state = _read(path, shape)
        except Exception as e:
            # Whatever the reason: all ranks have to learn of it before any of them stops.
            problem = f"{type(e).__name__}: {e}"
    header: list[Any] = [
        problem,
        None if state is None else (state["step"], state["exp_avg"].dtype),
    ]
    dist.broadcast_object_list(header, src=0)
    problem, found = header
    if problem:
        raise unusable(path, problem)
    if found is None:
        return None
    step, dtype = found
    moments = {}
    for name in MOMENTS:
        tensor = torch.empty(shape, dtype=dtype) if state is None else state[name]
        tensor = tensor.to(device)
        dist.broadcast(tensor, src=0)
        moments[name] = tensor.cpu()
    return {**moments, "step": step}


def _read(path: Path, shape: tuple[int, int]) -> State:
    with safe_open(path, framework="pt") as file:
        metadata, moments = file.metadata(), {name: file.get_tensor(name) for name in MOMENTS}
    for name, tensor in moments.items():
        check_model(tuple(tensor.shape), shape)
        check_undamaged(metadata[f"checksum.{name}"] == str(_checksum(tensor)))
    return {**moments, "step": int(metadata["step"])}


def _checksum(x: torch.Tensor) -> int:
    return int(checksum(x, 0, None))
