# SPDX-License-Identifier: Apache-2.0
"""Gradient sums of the vocabulary rows that were touched since the last optimizer step, and their sparse reduction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.chunks import chunk_slices

REDUCTION_ELEMENTS = 1 << 25
"""Elements of one reduction: 128 MiB of float32. More touched rows than fit are reduced in several."""


class RowSums:
    """``sum of g_j`` and the number of tokens, for the touched rows ``j`` of this rank only.

    Args:
        rows: vocabulary rows of this rank.
        hidden_size: H.
    """

    def __init__(self, rows: int, hidden_size: int, device: torch.device, dtype: torch.dtype):
        self.dtype = dtype
        self._shape = (rows, hidden_size)
        self._slot = torch.full((rows,), -1, device=device, dtype=torch.int64)
        # The last element counts accepted tokens: they travel in the same reduction.
        self._count = torch.zeros(rows + 1, device=device, dtype=torch.int64)
        self._sums = torch.empty(0, hidden_size, device=device, dtype=dtype)
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(x.nbytes for x in (self._slot, self._count, self._sums))

    def count_tokens(self, accepted: Tensor) -> None:
        """``accepted``: scalar int64, tokens accepted, wherever the rows of their supports are held."""
        self._count[-1] += accepted

    def count_entries(self, rows: Tensor) -> None:
        """``rows [P]`` int64: the row of every entry of their supports that is held here."""
        self._count[:-1] += torch.bincount(rows, minlength=self._shape[0])

    def add(self, rows: Tensor, sums: Tensor) -> None:
        """Add ``sums [s, H]`` to ``rows [s]``, each named once."""
        new = rows[self._slot[rows] < 0]
        needed = self._used + len(new)
        if needed > len(self._sums):
            capacity = min(max(needed, 2 * len(self._sums)), self._shape[0])
            grown = self._sums.new_zeros(capacity, self._shape[1])
            grown[: self._used] = self._sums[: self._used]
            self._sums = grown
        self._slot[new] = torch.arange(self._used, needed, device=rows.device)
        self._used = needed
        self._sums[self._slot[rows]] += sums

    def clear(self) -> None:
        """Forget everything. The memory is given back: the next mini-batch touches other rows."""
        self._slot.fill_(-1)
        self._count.zero_()
        self._sums = self._sums.new_empty(0, self._shape[1])
        self._used = 0

    def move(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """To another device or dtype."""
        self.dtype = dtype or self.dtype
        self._sums = self._sums.to(device=device, dtype=dtype)
        self._slot, self._count = self._slot.to(device=device), self._count.to(device=device)

    def reduce(self, groups: Sequence[collectives.Group]) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
        """Mean gradient of every row touched on any rank. Collective; per group one reduction of the counts and one of the
        rows in the union of the ranks' touched rows (several if they exceed ``REDUCTION_ELEMENTS``).

        Returns:
            The number of accepted tokens (scalar), and an iterator over ``(rows [r], mean [r, H])``, to be exhausted on
            every rank.
        """
        count = collectives.sum_(self._count.clone(), groups)
        return count[-1], self._means(count[:-1], groups)

    def _means(self, count: Tensor, groups: Sequence[collectives.Group]) -> Iterator[tuple[Tensor, Tensor]]:
        rows = count.nonzero()[:, 0]
        for part in chunk_slices(len(rows), max(1, REDUCTION_ELEMENTS // self._shape[1])):
            slot = self._slot[rows[part]]
            if len(self._sums):
                mean = self._sums[slot.clamp(min=0)].masked_fill_((slot < 0)[:, None], 0)
            else:
                mean = self._sums.new_zeros(len(slot), self._shape[1])
            collectives.sum_(mean, groups)
            yield rows[part], mean.div_(count[rows[part], None])
