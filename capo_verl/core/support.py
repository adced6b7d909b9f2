# SPDX-License-Identifier: Apache-2.0
"""The support S of a response token: the ids of its k largest logits, and the policy renormalised
over them.

The vocabulary may be sharded over the tensor-parallel group: each rank contributes its k best rows,
one gather makes the candidates known everywhere, and every rank keeps the entries whose rows it
holds. Of equal logits the lower id wins, so the choice depends neither on the sharding nor on the
order in which a device happens to select.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.chunks import chunk_slices, scratch_elements
from capo_verl.core.keys import NON_FINITE, ids_of, logits_of
from capo_verl.core.logits import LogitRows, VocabShard

if TYPE_CHECKING:
    from capo_verl.core.kernels import Kernels


@dataclass(frozen=True)
class Pairs:
    """Flat list of the (token, row) entries held by this rank, ordered by token."""

    token: Tensor
    """``[P]`` int64, index of the token."""
    row: Tensor
    """``[P]`` int64, row of this rank's shard."""
    probs: Tensor
    """``[P]``, pi of the entry."""
    taken: Tensor
    """``[P]`` bool, whether the row is the taken token's."""

    @property
    def v(self) -> Tensor:
        """``[P]``: e - pi."""
        return self.taken.to(self.probs.dtype) - self.probs


class Block(NamedTuple):
    """c entries of each of n tokens, for arithmetic on whole tokens."""

    tokens: slice
    row: Tensor
    """``[n, c]`` int64, rows of this rank's shard."""
    probs: Tensor
    """``[n, c]``"""
    taken: Tensor
    """``[n, c]`` bool"""
    held: Tensor
    """``[n, c]`` bool, False for entries that only fill up: row 0, nothing of the support."""


class TopKSupport:
    """k entries per token, known on every tensor-parallel rank.

    Attributes:
        ids: ``[N, k]`` int64, global token ids.
        probs: ``[N, k]``, pi in the compute dtype.
        finite: ``[N]`` bool, False where a logit was not finite.
        inside: ``[N]`` bool, whether the taken token is in the support.
    """

    def __init__(
        self, ids: Tensor, probs: Tensor, finite: Tensor, actions: Tensor, shard: VocabShard
    ):
        self.ids, self.probs, self.finite, self.actions, self.shard = (
            ids,
            probs,
            finite,
            actions,
            shard,
        )
        self.taken = ids == actions[:, None]
        self.inside = self.taken.any(-1)

    @property
    def v(self) -> Tensor:
        """``[N, k]``: e - pi."""
        return self.taken.to(self.probs.dtype) - self.probs

    def pairs(self, include: Tensor) -> Pairs:
        """Entries of the tokens in ``include [N]`` bool whose rows this rank holds.

        Waits for the device.
        """
        row = self.ids - self.shard.start
        held = (row >= 0) & (row < self.shard.rows) & include[:, None]
        token, column = held.nonzero(as_tuple=True)
        return Pairs(
            token, row[token, column], self.probs[token, column], self.taken[token, column]
        )

    def blocks(self, entries: int, dense: bool = False) -> Iterator[Block]:
        """The entries whose rows this rank holds, about ``entries`` at a time.

        Args:
            dense: with as few others among them as possible, for which the device is waited for.
        """
        n, k = self.ids.shape
        row = self.ids - self.shard.start
        held = (row >= 0) & (row < self.shard.rows)
        probs, taken, c = self.probs, self.taken, int(held.sum(-1).max()) if dense and n else k
        if c < k:
            order = held.logical_not().byte().argsort(dim=-1, stable=True)[:, :c]
            row, held, probs, taken = (x.gather(1, order) for x in (row, held, probs, taken))
        row, taken = torch.where(held, row, 0), taken & held
        for tokens in chunk_slices(n if c else 0, max(1, entries // max(1, c))):
            yield Block(tokens, row[tokens], probs[tokens], taken[tokens], held[tokens])

    def snapshot(self) -> TopKSupport:
        """A support that stays valid after the caller has overwritten the logits: nothing to copy
        here.
        """
        return self

    @staticmethod
    def concatenate(parts: Sequence[TopKSupport]) -> TopKSupport:
        """The tokens of all parts, in order."""
        joined = copy(parts[0])
        for name in ("ids", "probs", "finite", "actions", "taken", "inside"):
            setattr(joined, name, torch.cat([getattr(part, name) for part in parts]))
        return joined


class FullSupport:
    """The whole vocabulary; probabilities are recomputed from the logits, a run of tokens at a
    time.

    Attributes:
        finite: ``[N]`` bool, False where a logit was not finite.
        inside: ``[N]`` bool, True.
    """

    def __init__(
        self,
        logits: LogitRows,
        log_normaliser: Tensor,
        finite: Tensor,
        actions: Tensor,
        shard: VocabShard,
    ):
        self.logits, self.log_normaliser, self.finite = logits, log_normaliser, finite
        self.actions, self.shard = actions, shard
        self.inside = torch.ones_like(finite)

    def pairs(self, include: Tensor) -> Pairs:
        """The pairs of the tokens (:meth:`TopKSupport.pairs`)."""
        token, rows = include.nonzero()[:, 0], self.shard.real_rows
        row = torch.arange(rows, device=self.logits.device)
        probs, taken = self._probs(token), row == (self.actions[token, None] - self.shard.start)
        return Pairs(
            token.repeat_interleave(rows), row.repeat(len(token)), probs.flatten(), taken.flatten()
        )

    def blocks(self, entries: int, dense: bool = False) -> Iterator[Block]:
        """Blocks of tokens (:meth:`TopKSupport.blocks`); all entries are held here."""
        row = torch.arange(self.shard.real_rows, device=self.logits.device)
        for tokens, probs, taken in self.all_rows():
            for part in chunk_slices(len(probs), max(1, entries // max(1, len(row)))):
                for columns in chunk_slices(len(row), entries):
                    piece = probs[part, columns]
                    at = slice(tokens.start + part.start, tokens.start + part.stop)
                    rows = row[columns].expand_as(piece)
                    yield Block(
                        at,
                        rows,
                        piece,
                        taken[part, columns],
                        torch.ones_like(piece, dtype=torch.bool),
                    )

    def all_rows(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """A run of tokens, their ``probs [n, real rows]`` and ``taken [n, real rows]`` bool, until
        all have been.
        """
        rows = self.shard.real_rows
        row_ids = torch.arange(rows, device=self.logits.device) + self.shard.start
        for tokens in chunk_slices(
            len(self.logits), max(1, scratch_elements(self.logits.device) // max(1, rows))
        ):
            yield tokens, self._probs(tokens), row_ids == self.actions[tokens, None]

    def _probs(self, tokens: slice | Tensor) -> Tensor:
        logits = self.logits.cool(self.logits.read(tokens, self.shard.real_rows), tokens).to(
            self.log_normaliser.dtype
        )
        return (logits - self.log_normaliser[tokens, None]).exp_()

    def snapshot(self) -> FullSupport:
        """A copy that stays valid after the caller has overwritten the logits in place."""
        return FullSupport(
            self.logits.copy(), self.log_normaliser, self.finite, self.actions, self.shard
        )

    @staticmethod
    def concatenate(parts: Sequence[FullSupport]) -> FullSupport:
        """The tokens of all parts, in order."""
        joined = copy(parts[0])
        joined.logits = LogitRows.concatenate([part.logits for part in parts])
        for name in ("log_normaliser", "finite", "actions", "inside"):
            setattr(joined, name, torch.cat([getattr(part, name) for part in parts]))
        return joined


Support = TopKSupport | FullSupport


def find_support(
    logits: LogitRows,
    actions: Tensor,
    top_k: int | None,
    shard: VocabShard,
    dtype: torch.dtype,
    tp_group: collectives.Group,
    kernels: Kernels,
) -> Support:
    """Support of every token.

    Args:
        logits: of N tokens, this rank's rows of the vocabulary; any float dtype.
        actions: ``[N]`` int64, global ids of the taken tokens.
        top_k: support size, None = whole vocabulary.
        shard: which rows these are.
        dtype: compute dtype of the probabilities.
        tp_group: tensor-parallel group; one gather of k candidates per token and rank.
    """
    if top_k is None or top_k >= shard.vocab_size:
        return _full_support(logits, actions, shard, dtype, tp_group)
    k = min(top_k, shard.rows)
    if logits.dtype == torch.float64:
        # They cannot share an int64 with their id; they come from tests and analyses, where a
        # stable sort is fast enough.
        values, ids, finite = _merge_sorted(
            collectives.gather(_sorted_candidates(logits, k, shard), tp_group), top_k
        )
    else:
        best = torch.cat([kernels.best_keys(block, k, shard) for block in logits.blocks()])
        values, ids, finite = _merge_keys(collectives.gather(best, tp_group), top_k)
    return TopKSupport(ids, values.to(dtype).softmax(-1), finite, actions, shard)


def _merge_keys(keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    if keys.shape[1] > k:
        keys = keys.topk(k, dim=-1).values
    return logits_of(keys), ids_of(keys), keys[:, 0] != NON_FINITE


def _finite(logits: Tensor) -> Tensor:
    # NaN passes through both; two passes are three times as fast as aminmax on a CPU.
    return logits.amax(-1).isfinite() & logits.amin(-1).isfinite()


def _sorted_candidates(logits: LogitRows, k: int, shard: VocabShard) -> Tensor:
    """``[N, 3k]``: per candidate its logit, its id and whether the row of logits is finite (ids are
    exact in float64).
    """
    chunks = list(
        chunk_slices(len(logits), max(1, scratch_elements(logits.device) // shard.rows))
    ) or [slice(0, 0)]
    return torch.cat(
        [
            _sorted(logits.cool(logits.read(part, shard.real_rows), part), k, shard)
            for part in chunks
        ]
    )


def _sorted(logits: Tensor, k: int, shard: VocabShard) -> Tensor:
    values, rows = logits.sort(dim=-1, descending=True, stable=True)
    values, rows = values[:, :k], rows[:, :k]
    if shard.real_rows < k:
        short = (0, k - shard.real_rows)
        values = torch.nn.functional.pad(values, short, value=-torch.inf)
        rows = torch.nn.functional.pad(rows, short, value=0)
    finite = _finite(logits) if shard.real_rows else torch.ones_like(values[:, 0], dtype=torch.bool)
    columns = (
        values,
        (rows + shard.start).to(values.dtype),
        finite[:, None].expand_as(values).to(values.dtype),
    )
    return torch.stack(columns, dim=-1).flatten(1)


def _merge_sorted(candidates: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, ids, finite = candidates.unflatten(1, (-1, 3)).unbind(-1)
    # Ranks come in order of their ids, so a stable sort keeps the lower id first among equal
    # logits.
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order[:, :k]).long(), (finite > 0).all(-1)


def _full_support(
    logits: LogitRows,
    actions: Tensor,
    shard: VocabShard,
    dtype: torch.dtype,
    tp_group: collectives.Group,
) -> FullSupport:
    n = len(logits)
    log_normaliser = torch.full((n,), -torch.inf, device=logits.device, dtype=dtype)
    finite = torch.ones(n, device=logits.device, dtype=torch.bool)
    if shard.real_rows:
        for tokens in chunk_slices(n, max(1, scratch_elements(logits.device) // shard.rows)):
            real = logits.cool(logits.read(tokens, shard.real_rows), tokens)
            log_normaliser[tokens] = real.to(dtype).logsumexp(-1)
            finite[tokens] = _finite(real)
    gathered = collectives.gather(torch.stack((log_normaliser, finite.to(dtype)), dim=-1), tp_group)
    normalisers, flags = gathered.unflatten(1, (-1, 2)).unbind(-1)
    return FullSupport(logits, normalisers.logsumexp(-1), (flags > 0).all(-1), actions, shard)
