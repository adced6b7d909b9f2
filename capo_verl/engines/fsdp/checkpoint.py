# SPDX-License-Identifier: Apache-2.0
"""CAPO's moments in a checkpoint of the FSDP engine: ``<checkpoint>/capo/moments.safetensors``,
tensors and a few strings.

Every rank holds the same moments, so the first one writes and reads them, for runs of any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from capo_verl.core.checksum import checksum
from capo_verl.engines import checkpoint_files
from capo_verl.engines.checkpoint import State
from capo_verl.engines.checkpoint_files import (
    MOMENTS,
    Header,
    check_model,
    check_undamaged,
    not_saved,
    sealed,
    together,
    unusable,
)
from capo_verl.utils import replacing

CHECKSUMS = tuple(f"checksum.{name}" for name in MOMENTS)


def path_of(checkpoint: str) -> Path:
    return Path(checkpoint, "capo", "moments.safetensors")


def save(checkpoint: str, state: State) -> None:
    """Write the moments, whole or not at all. Collective over all ranks.

    Raises:
        RuntimeError: on every rank, if they cannot be written.
    """
    path = path_of(checkpoint)

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        moments = {name: state[name].cpu().contiguous() for name in MOMENTS}
        header = Header(state["step"], *moments["exp_avg"].shape)
        sums = dict(zip(CHECKSUMS, map(str, sealed(_checksums(moments), header)), strict=True))
        with replacing(path) as temporary:
            save_file(moments, temporary, metadata={"step": str(header.step), **sums})

    together(write if dist.get_rank() == 0 else None, path, not_saved)


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

    def read() -> State | None:
        saved = path.parent.is_dir() and not checkpoint_files.has_no_moments(checkpoint)
        return _read(path, shape) if saved else None

    state = together(read if dist.get_rank() == 0 else None, path, unusable)
    header: list[Any] = [None if state is None else (state["step"], state["exp_avg"].dtype)]
    dist.broadcast_object_list(header, src=0)
    if header[0] is None:
        return None
    step, dtype = header[0]
    moments = {}
    for name in MOMENTS:
        tensor = torch.empty(shape, dtype=dtype) if state is None else state[name]
        tensor = tensor.to(device)
        dist.broadcast(tensor, src=0)
        moments[name] = tensor.cpu()
    return {**moments, "step": step}


def _read(path: Path, shape: tuple[int, int]) -> State:
    with safe_open(path, framework="pt") as file:
        metadata, moments = file.metadata() or {}, {n: file.get_tensor(n) for n in MOMENTS}
    for tensor in moments.values():
        check_model(tuple(tensor.shape), shape)
    if set(metadata) != {"step", *CHECKSUMS}:
        raise ValueError(f"its header does not hold step, {', '.join(CHECKSUMS)}")
    header = Header(int(metadata["step"]), *shape)
    saved = [int(metadata[name]) for name in CHECKSUMS]
    check_undamaged(saved, _checksums(moments), header, path)
    return {**moments, "step": header.step}


def _checksums(moments: Mapping[str, Tensor]) -> list[int]:
    return [int(checksum(moments[name], 0, None)) for name in MOMENTS]
