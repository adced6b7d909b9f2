# SPDX-License-Identifier: Apache-2.0
"""The accepted tokens of a mini-batch, from their evaluation to the update of the moments.

Hidden states and supports are kept, not row sums: a few megabytes per thousand tokens where the row
sums of a large vocabulary would be gigabytes, and every touched row is summed and used in one go.
Only when the hidden states would outgrow half of what the sums of all rows take, they are folded
into those.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.chunks import chunk_slices
from capo_verl.core.kernels import Kernels
from capo_verl.core.kernels.entries import RowEntries, sort_by_row
from capo_verl.core.kernels.moments import Moments
from capo_verl.core.memory import fold_limit
from capo_verl.core.support import FullSupport, Support, TopKSupport
from capo_verl.core.validation import check_unmodified, version

SCRATCH_ELEMENTS = 1 << 24
"""Elements of one reduction, and of hidden states joined for it: 64 MiB of float32.

What exceeds it is cut into columns.
"""
COLUMNS = 64
"""Columns are cut at multiples of this: kernels are compiled for aligned widths."""


class _MicroBatch(NamedTuple):
    hidden: Tensor
    version: int
    advantages: Tensor
    support: TopKSupport
    accepted: Tensor


class AcceptedTokens:
    """The tokens that :class:`AdamModel` learns from, on one rank.

    Args:
        rows: vocabulary rows of this rank.
        hidden_size: H.
        kernels: what computes.
    """

    def __init__(
        self,
        rows: int,
        hidden_size: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels,
    ):
        self.dtype = dtype
        self._rows, self._hidden_size, self._kernels = rows, hidden_size, kernels
        # The last element counts accepted tokens: they travel in the same reduction.
        self._count = torch.zeros(rows + 1, device=device, dtype=torch.int64)
        self._sums: Tensor | None = None
        self._kept: list[_MicroBatch] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the counts and, once folded, the sums."""
        return self._count.nbytes + (0 if self._sums is None else self._sums.nbytes)

    def add(self, hidden: Tensor, advantages: Tensor, support: Support, accepted: Tensor) -> None:
        """Keep the tokens in ``accepted [N]``.

        Args:
            hidden: ``[N, H]``, kept by reference until the update; advantages: ``[N]`` in the
                compute dtype.
        """
        self._count[-1] += accepted.sum()
        if isinstance(support, FullSupport):
            self._fold_full(hidden, advantages, support, accepted)
            return
        self._kept.append(_MicroBatch(hidden, version(hidden), advantages, support, accepted))
        held = sum(m.hidden.nbytes for m in self._kept)
        if held > fold_limit(self._rows, self._hidden_size):
            self._fold()

    def check(self) -> None:
        """
        Raises:
            RuntimeError: if hidden states were overwritten since they were evaluated.
        """
        for m in self._kept:
            check_unmodified(m.hidden, m.version)

    def clear(self) -> None:
        """Forget everything; the memory is given back."""
        self._count.zero_()
        self._sums = None
        self._kept = []

    def move(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Move the sums to another device or dtype. Micro-batches stay where they are."""
        self.dtype = dtype or self.dtype
        self._count = self._count.to(device=device)
        if self._sums is not None:
            self._sums = self._sums.to(device=device, dtype=dtype)

    def update(self, moments: Moments, groups: Sequence[collectives.Group]) -> None:
        """Move ``moments`` and their number of updates by the mean gradients over all ranks of
        ``groups``. Collective.
        """
        if self._sums is not None:
            self._fold()
        entries = self._entries(self._kept) if self._kept else None
        count = self._count.clone()
        if entries is not None:
            count[:-1] += entries.counts
        if any(collectives.size(group) > 1 for group in groups):
            collectives.sum_(count, groups)
            self._update_over_ranks(moments, entries, count[:-1], groups)
        elif entries is not None:
            for columns in self._columns(self._tokens):
                self._kernels.update(moments, columns, entries, self._hidden(columns))
        elif self._sums is not None:
            self._kernels.move(moments, slice(0, self._hidden_size), None, self._sums, count[:-1])
        moments.steps.add_(count[-1] > 0)

    def _update_over_ranks(
        self,
        moments: Moments,
        entries: RowEntries | None,
        count: Tensor,
        groups: Sequence[collectives.Group],
    ) -> None:
        """Reduce the rows that any rank touched, as many columns at a time as one reduction
        holds.
        """
        # The one place that waits for the device: the number of rows, without which all of them
        # would be reduced.
        rows = count.nonzero()[:, 0]
        if not len(rows):
            return
        # All ranks cut alike: by the rows, which they agree on, and not by their own tokens.
        for columns in self._columns(len(rows)):
            if self._sums is not None:
                sums = self._sums[rows, columns]
            else:
                sums = torch.zeros(
                    len(rows), columns.stop - columns.start, device=count.device, dtype=self.dtype
                )
            if entries is not None:
                for part in self._columns(self._tokens, columns):
                    inner = slice(part.start - columns.start, part.stop - columns.start)
                    sums[:, inner] = self._kernels.row_sums(entries, rows, self._hidden(part))
            collectives.sum_(sums, groups)
            self._kernels.move(moments, columns, rows, sums, count[rows])

    @property
    def _tokens(self) -> int:
        return sum(len(m.hidden) for m in self._kept)

    def _columns(self, rows: int, within: slice | None = None) -> Iterator[slice]:
        """Columns of H, or of a part of them, so many at a time that ``rows`` of them are no more
        than ``SCRATCH_ELEMENTS``.
        """
        first, last = (0, self._hidden_size) if within is None else (within.start, within.stop)
        width = max(COLUMNS, SCRATCH_ELEMENTS // max(1, rows) // COLUMNS * COLUMNS)
        for part in chunk_slices(last - first, width):
            yield slice(first + part.start, first + part.stop)

    def _hidden(self, columns: slice) -> Tensor:
        """``[N, c]``, in columns so that several micro-batches can be joined without holding all of
        them twice.
        """
        parts = [m.hidden[:, columns] for m in self._kept]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _entries(self, kept: Sequence[_MicroBatch]) -> RowEntries:
        row = torch.cat([m.support.ids for m in kept]) - kept[0].support.shard.start
        weight = torch.cat([m.advantages[:, None] * m.support.v for m in kept])
        return sort_by_row(row, weight, torch.cat([m.accepted for m in kept]), self._rows)

    def _fold(self) -> None:
        for m in self._kept:
            entries = self._entries([m])
            self._count[:-1] += entries.counts
            self._kernels.add_row_sums(entries, m.hidden, self._all_sums())
        self._kept = []

    def _fold_full(
        self, hidden: Tensor, advantages: Tensor, support: FullSupport, accepted: Tensor
    ) -> None:
        """Every row is touched by every token: a matrix product, a run of tokens at a time."""
        self._count[: support.shard.real_rows] += accepted.sum()
        sums = self._all_sums()
        for tokens, probs, taken in support.all_rows():
            # What is not accepted may be anything, NaN included: 0 times NaN would not do.
            keep = accepted[tokens, None]
            weight = torch.where(
                keep, advantages[tokens, None] * (taken.to(probs.dtype) - probs), 0
            )
            sums[: weight.shape[1]].addmm_(
                weight.T, hidden[tokens].to(self.dtype).masked_fill(~keep, 0)
            )

    def _all_sums(self) -> Tensor:
        if self._sums is None:
            self._sums = torch.zeros(
                self._rows, self._hidden_size, device=self._count.device, dtype=self.dtype
            )
        return self._sums
