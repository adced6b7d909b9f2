# SPDX-License-Identifier: Apache-2.0
"""The support S of a response token: the ids of its k largest logits, and the policy renormalised over them.

The vocabulary may be sharded over the tensor-parallel group: each rank contributes its k best rows, one gather makes the
candidates known everywhere, and every rank keeps the entries whose rows it holds. Of equal logits the lower id wins, so
the choice depends neither on the sharding nor on the order in which a device happens to select.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.chunks import chunk_slices, scratch_elements

_LOWEST_KEY = torch.iinfo(torch.int64).min
_NON_FINITE_KEY = torch.iinfo(torch.int64).max
_ID_MASK = 0xFFFFFFFF


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
    """The logits of N tokens, read a run at a time: they are too large to copy whole.

    Args:
        logits: ``[M, rows]``; never written to.
        positions: ``[N]`` int64, which of the M; None = all.
        temperature: ``[N]``, divides the logits in their own dtype, as the trainer does; None = already done.
    """

    def __init__(self, logits: Tensor, positions: Tensor | None = None, temperature: Tensor | None = None):
        self._logits, self._positions, self._temperature = logits, positions, temperature
        self.device, self.dtype = logits.device, logits.dtype

    def __len__(self) -> int:
        return len(self._logits if self._positions is None else self._positions)

    def read(self, tokens: slice | Tensor, rows: int) -> Tensor:
        """``[n, rows]``: the first ``rows`` columns of the given tokens, after temperature."""
        at = tokens if self._positions is None else self._positions[tokens]
        logits = self._logits[at, :rows]
        if self._temperature is not None:
            logits = logits / self._temperature[tokens, None].to(logits.dtype)
        return logits

    def copy(self) -> LogitRows:
        return LogitRows(self.read(slice(None), self._logits.shape[1]).clone())


@dataclass(frozen=True)
class Pairs:
    """Flat list of the (token, row) entries held by this rank, ordered by token."""

    tokens: slice
    """The run of tokens covered."""
    token: Tensor
    """``[P]`` int64, index of the token, within ``tokens``."""
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


class TopKSupport:
    """k entries per token, known on every tensor-parallel rank.

    Attributes:
        ids: ``[N, k]`` int64, global token ids.
        probs: ``[N, k]``, pi in the compute dtype.
        finite: ``[N]`` bool, False where a logit was not finite.
        inside: ``[N]`` bool, whether the taken token is in the support.
    """

    def __init__(self, ids: Tensor, probs: Tensor, finite: Tensor, actions: Tensor, shard: VocabShard):
        self.ids, self.probs, self.finite, self.shard = ids, probs, finite, shard
        self.taken = ids == actions[:, None]
        self.inside = self.taken.any(-1)

    def pairs(self, include: Tensor | None = None, max_pairs: int | None = None) -> Iterator[Pairs]:
        """Entries of the tokens in ``include [N]`` (all if None) whose rows this rank holds, a run of tokens at a time.

        Args:
            include: ``[N]`` bool.
            max_pairs: entries per run, before those of other ranks are left out; None = one run.
        """
        n, k = self.ids.shape
        for tokens in chunk_slices(n, max(1, (max_pairs or n * k) // k)):
            row = self.ids[tokens] - self.shard.start
            here = (row >= 0) & (row < self.shard.rows)
            if include is not None:
                here &= include[tokens, None]
            at, column = here.nonzero(as_tuple=True)
            probs, taken = self.probs[tokens][at, column], self.taken[tokens][at, column]
            yield Pairs(tokens, at + tokens.start, row[at, column], probs, taken)

    def snapshot(self) -> TopKSupport:
        """A support that stays valid after the caller has overwritten the logits: nothing to copy here."""
        return self

    @staticmethod
    def concatenate(parts: Sequence[TopKSupport]) -> TopKSupport:
        """The tokens of all parts, in order."""
        joined = copy(parts[0])
        for name in ("ids", "probs", "finite", "taken", "inside"):
            setattr(joined, name, torch.cat([getattr(part, name) for part in parts]))
        return joined


class FullSupport:
    """The whole vocabulary; probabilities are recomputed from the logits, a run of tokens at a time.

    Attributes:
        finite: ``[N]`` bool, False where a logit was not finite.
        inside: ``[N]`` bool, True.
    """

    def __init__(self, logits: LogitRows, log_normaliser: Tensor, finite: Tensor, actions: Tensor, shard: VocabShard):
        self.logits, self.log_normaliser, self.finite = logits, log_normaliser, finite
        self.actions, self.shard = actions, shard
        self.inside = torch.ones_like(finite)

    def pairs(self, include: Tensor | None = None, max_pairs: int | None = None) -> Iterator[Pairs]:
        """As :meth:`TopKSupport.pairs`."""
        n, rows = len(self.logits), self.shard.real_rows
        if rows == 0:
            return
        row_ids = torch.arange(rows, device=self.logits.device)
        for tokens in chunk_slices(n, max(1, (max_pairs or n * rows) // rows)):
            at = torch.arange(tokens.start, tokens.stop, device=self.logits.device)
            if include is not None:
                at = at[include[tokens]]
            logits = self.logits.read(at, rows).to(self.log_normaliser.dtype)
            probs = (logits - self.log_normaliser[at, None]).exp_()
            taken = row_ids == (self.actions[at, None] - self.shard.start)
            yield Pairs(tokens, at.repeat_interleave(rows), row_ids.repeat(len(at)), probs.flatten(), taken.flatten())

    def snapshot(self) -> FullSupport:
        """A copy that stays valid after the caller has overwritten the logits in place."""
        return FullSupport(self.logits.copy(), self.log_normaliser, self.finite, self.actions, self.shard)

    @staticmethod
    def concatenate(parts: Sequence[FullSupport]) -> FullSupport:
        """The tokens of all parts, in order."""
        joined = copy(parts[0])
        joined.logits = LogitRows(torch.cat([part.logits.read(slice(None), part.shard.rows) for part in parts]))
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
    # 64-bit logits cannot share an int64 with their id; they come from tests and analyses, where a stable sort is fast enough.
    wide = logits.dtype == torch.float64
    local, merge = (_sorted_candidates, _merge_sorted) if wide else (_keyed_candidates, _merge_keyed)
    k, rows = min(top_k, shard.rows), shard.real_rows
    chunks = list(chunk_slices(len(logits), max(1, scratch_elements(logits.device) // shard.rows))) or [slice(0, 0)]
    candidates = torch.cat([local(logits.read(tokens, rows), k, shard) for tokens in chunks])
    values, ids, finite = merge(collectives.gather(candidates, tp_group), top_k)
    return TopKSupport(ids, values.to(dtype).softmax(-1), finite, actions, shard)


def _finite(logits: Tensor) -> Tensor:
    low, high = logits.aminmax(dim=-1)  # NaN propagates; no temporary of the size of the logits
    return low.isfinite() & high.isfinite()


def _keyed_candidates(logits: Tensor, k: int, shard: VocabShard) -> Tensor:
    """``[n, k]`` int64 keys of ``[n, real rows]``: order-preserving bits of the logit above, complemented id below."""
    bits = (logits.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(shard.start, shard.start + shard.real_rows, device=logits.device)
    keys = (ordered.long() << 32) | (_ID_MASK - ids)
    if shard.real_rows < k:
        keys = torch.nn.functional.pad(keys, (0, k - shard.real_rows), value=_LOWEST_KEY)
    best = keys.topk(k, dim=-1).values
    if shard.real_rows:
        best[:, 0].masked_fill_(~_finite(logits), _NON_FINITE_KEY)
    return best


def _merge_keyed(keys: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    keys = keys.topk(k, dim=-1).values
    ordered = (keys >> 32).int()
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), _ID_MASK - (keys & _ID_MASK), keys[:, 0] != _NON_FINITE_KEY


def _sorted_candidates(logits: Tensor, k: int, shard: VocabShard) -> Tensor:
    """``[n, 3k]``: per candidate its logit, its id and whether the row of logits is finite (ids are exact in float64)."""
    values, rows = logits.sort(dim=-1, descending=True, stable=True)
    values, rows = values[:, :k], rows[:, :k]
    if shard.real_rows < k:
        short = (0, k - shard.real_rows)
        values = torch.nn.functional.pad(values, short, value=-torch.inf)
        rows = torch.nn.functional.pad(rows, short, value=0)
    finite = _finite(logits) if shard.real_rows else torch.ones_like(values[:, 0], dtype=torch.bool)
    columns = (values, (rows + shard.start).to(values.dtype), finite[:, None].expand_as(values).to(values.dtype))
    return torch.stack(columns, dim=-1).flatten(1)


def _merge_sorted(candidates: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, ids, finite = candidates.unflatten(1, (-1, 3)).unbind(-1)
    # Ranks come in order of their ids, so a stable sort keeps the lower id first among equal logits.
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order[:, :k]).long(), (finite > 0).all(-1)


def _full_support(
    logits: LogitRows, actions: Tensor, shard: VocabShard, dtype: torch.dtype, tp_group: collectives.Group
) -> FullSupport:
    n = len(logits)
    log_normaliser = torch.full((n,), -torch.inf, device=logits.device, dtype=dtype)
    finite = torch.ones(n, device=logits.device, dtype=torch.bool)
    if shard.real_rows:
        for tokens in chunk_slices(n, max(1, scratch_elements(logits.device) // shard.rows)):
            real = logits.read(tokens, shard.real_rows)
            log_normaliser[tokens] = real.to(dtype).logsumexp(-1)
            finite[tokens] = _finite(real)
    gathered = collectives.gather(torch.stack((log_normaliser, finite.to(dtype)), dim=-1), tp_group)
    normalisers, flags = gathered.unflatten(1, (-1, 2)).unbind(-1)
    return FullSupport(logits, normalisers.logsumexp(-1), (flags > 0).all(-1), actions, shard)
