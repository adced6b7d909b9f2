# SPDX-License-Identifier: Apache-2.0
"""The kernels in Triton: float32 arithmetic on float32, bfloat16 or float16 tensors, nothing waits
for the device.

What they do not cover goes to ``plain``: float64, the whole vocabulary as support, and supports of
more than 1,024 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.core.kernels import plain
from capo_verl.core.kernels.entries import RowEntries
from capo_verl.core.kernels.fused.curvature_kernel import launch_partial_sums
from capo_verl.core.kernels.fused.moment_kernels import launch_move, launch_row_sums, launch_update
from capo_verl.core.kernels.fused.support_kernel import MAX_K, launch_best_keys
from capo_verl.core.kernels.moments import Moments
from capo_verl.core.logits import LogitRows, VocabShard
from capo_verl.core.support import Support, TopKSupport


def best_keys(logits: LogitRows, k: int, shard: VocabShard) -> Tensor:
    """The kernel of ``plain.best_keys``."""
    if k > MAX_K or shard.real_rows == 0 or logits.logits.stride(-1) != 1:
        return plain.best_keys(logits, k, shard)
    temperature = None if logits.temperature is None else logits.temperature.contiguous()
    with torch.cuda.device_of(
        logits.logits
    ):  # Triton launches on the current device; no matter on a CPU
        candidates = launch_best_keys(
            logits.logits, logits.positions, temperature, k, shard.real_rows, shard.start
        )
    return candidates.topk(k).values


def partial_sums(
    hidden: Tensor,
    advantages: Tensor,
    support: Support,
    moments: Moments,
    directions: Tensor | None = None,
) -> Tensor:
    """The kernel of ``plain.partial_sums``."""
    if not isinstance(support, TopKSupport) or advantages.dtype == torch.float64:
        return plain.partial_sums(hidden, advantages, support, moments, directions)
    with torch.cuda.device_of(hidden):
        return launch_partial_sums(hidden, advantages, support, moments, directions)


def row_sums(entries: RowEntries, rows: Tensor, hidden: Tensor) -> Tensor:
    """The kernel of ``plain.row_sums``."""
    if entries.weight.dtype == torch.float64:
        return plain.row_sums(entries, rows, hidden)
    sums = torch.empty(len(rows), hidden.shape[1], device=hidden.device, dtype=torch.float32)
    with torch.cuda.device_of(sums):
        launch_row_sums(entries, rows, hidden, sums, add=False)
    return sums


def add_row_sums(entries: RowEntries, hidden: Tensor, sums: Tensor) -> None:
    """The kernel of ``plain.add_row_sums``."""
    if entries.weight.dtype == torch.float64:
        plain.add_row_sums(entries, hidden, sums)
        return
    with torch.cuda.device_of(sums):
        launch_row_sums(entries, None, hidden, sums, add=True)


def move(
    moments: Moments, columns: slice, rows: Tensor | None, sums: Tensor, counts: Tensor
) -> None:
    """The kernel of ``plain.move``."""
    if sums.dtype == torch.float64:
        plain.move(moments, columns, rows, sums, counts)
        return
    with torch.cuda.device_of(sums):
        launch_move(moments, columns, rows, sums, counts)


def update(moments: Moments, columns: slice, entries: RowEntries, hidden: Tensor) -> None:
    """The kernel of ``plain.update``."""
    if entries.weight.dtype == torch.float64:
        plain.update(moments, columns, entries, hidden)
        return
    with torch.cuda.device_of(hidden):
        launch_update(moments, columns, entries, hidden)
