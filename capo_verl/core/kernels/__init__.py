# SPDX-License-Identifier: Apache-2.0
"""The inner loops of the filter, twice: in Triton for GPUs, in plain torch for everything else.

    best_keys       the k best rows of every token                             -> support
    partial_sums    u = P(A v h) h and its three sums per token, no row of it  -> m_H, m_F
    row_sums, add_row_sums    sums of the accepted gradients per row           -> moments
    move, update    moments moved by the mean gradients of the touched rows    -> moments

Both modules offer the same functions on the same tensors; ``plain`` documents them. Triton's wait
for nothing.
"""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch
from torch import Tensor

from capo_verl.core.kernels.entries import RowEntries
from capo_verl.core.kernels.moments import Moments
from capo_verl.core.logits import LogitRows, VocabShard
from capo_verl.core.support import Support

NAMES = ("torch", "triton")


class Kernels(Protocol):
    """A module of kernels."""

    def best_keys(self, logits: LogitRows, k: int, shard: VocabShard) -> Tensor: ...
    def partial_sums(
        self,
        hidden: Tensor,
        advantages: Tensor,
        support: Support,
        moments: Moments,
        directions: Tensor | None = None,
    ) -> Tensor: ...
    def row_sums(self, entries: RowEntries, rows: Tensor, hidden: Tensor) -> Tensor: ...
    def add_row_sums(self, entries: RowEntries, hidden: Tensor, sums: Tensor) -> None: ...
    def move(
        self, moments: Moments, columns: slice, rows: Tensor | None, sums: Tensor, counts: Tensor
    ) -> None: ...
    def update(
        self, moments: Moments, columns: slice, entries: RowEntries, hidden: Tensor
    ) -> None: ...


def choose(device: torch.device, name: str | None = None) -> Kernels:
    """The kernels for a device.

    Args:
        name: ``torch`` or ``triton``; None = triton on a GPU where it is installed, else torch.

    Raises:
        ValueError: for an unknown name.
        ImportError: for ``triton`` where it is not installed.
    """
    if name not in (None, *NAMES):
        raise ValueError(
            f"kernels={name!r}: expected one of {', '.join(NAMES)}, or None to choose by device"
        )
    if name is None:
        name = "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch"
    if name == "triton":
        from capo_verl.core.kernels import fused

        return fused
    from capo_verl.core.kernels import plain

    return plain
