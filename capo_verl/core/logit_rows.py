# SPDX-License-Identifier: Apache-2.0
"""The logits of many tokens, read a run at a time: they are too large to copy whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """The rows of the LM head held by this rank: global ids ``start .. start + rows``.

    Rows with an id >= ``vocab_size`` exist only to make the vocabulary divisible; they are never in a support.
    """

    vocab_size: int
    rows: int
    start: int

    @property
    def real_rows(self) -> int:
        return min(max(self.vocab_size - self.start, 0), self.rows)


class LogitRows:
    """N of M rows of logits.

    Args:
        logits: ``[M, rows]``; never written to.
        positions: ``[N]`` int64, which of the M; None = all.
        temperature: ``[N]``, divides the logits in their own dtype, as the trainer does; None = already done.
    """

    def __init__(self, logits: Tensor, positions: Tensor | None = None, temperature: Tensor | None = None):
        self.logits, self.positions, self.temperature = logits, positions, temperature
        self.device, self.dtype = logits.device, logits.dtype

    def __len__(self) -> int:
        return len(self.logits if self.positions is None else self.positions)

    def read(self, tokens: slice | Tensor, rows: int) -> Tensor:
        """``[n, rows]``: the first ``rows`` columns of the given tokens, before temperature."""
        return self.logits[tokens if self.positions is None else self.positions[tokens], :rows]

    def cool(self, values: Tensor, tokens: slice | Tensor) -> Tensor:
        """Logits ``[n, ...]`` of the given tokens, divided by the temperature.

        Division by a positive number keeps the order, so the largest may be searched before it.
        """
        if self.temperature is None:
            return values
        temperature = self.temperature[tokens].to(values.dtype)
        return values / temperature.view(-1, *[1] * (values.dim() - 1))

    def part(self, tokens: slice) -> LogitRows:
        """Those of some tokens; nothing is copied."""
        temperature = None if self.temperature is None else self.temperature[tokens]
        if self.positions is None:
            return LogitRows(self.logits[tokens], None, temperature)
        return LogitRows(self.logits, self.positions[tokens], temperature)

    def blocks(self) -> Iterator[LogitRows]:
        """The same rows in parts, at least one, whose ``logits`` exist as a tensor: these are such a part."""
        yield self

    def copy(self) -> LogitRows:
        everything = slice(None)
        return LogitRows(self.cool(self.read(everything, self.logits.shape[1]).clone(), everything))
