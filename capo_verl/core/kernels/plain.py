# SPDX-License-Identifier: Apache-2.0
"""The kernels in plain torch: for every device and dtype, a run of tokens or rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from capo_verl.core.chunks import chunk_slices, scratch_elements
from capo_verl.core.entries import RowEntries
from capo_verl.core.keys import LOWEST, NON_FINITE, ids_of, keys_of
from capo_verl.core.logit_rows import LogitRows, VocabShard
from capo_verl.core.moments import Moments
from capo_verl.core.rounding import round_to_bfloat16
from capo_verl.core.support import FullSupport, Pairs, Support

MAX_PAIRS = 1 << 18
"""Support entries looked at in one run: what is kept per entry, and the hidden states of the run, stay small."""


def best_keys(logits: LogitRows, k: int, shard: VocabShard) -> Tensor:
    """The ``k`` best rows of every token, best first.

    Rows are cut into runs of S. The k largest of all lie in the k runs with the largest maxima, of equal maxima the lower
    run: were an element outside of them, each of the k runs would hold one that comes before it. So a pass over the logits
    that only takes maxima leaves ``rows / S`` and then ``k S`` candidates to choose from.

    Args:
        logits: of N tokens, no wider than float32.

    Returns:
        ``[N, k]`` int64 keys (``keys.py``); ``LOWEST`` where the shard has fewer rows, ``NON_FINITE`` in the first column
        if a logit of the token is not finite.
    """
    rows = shard.real_rows
    width = 1 << round(math.log2(rows / k) / 2) if rows > 8 * k else 1
    chunk = max(1, scratch_elements(logits.device) // max(shard.rows, k * width))
    parts = [_best_of(logits, part, k, width, shard) for part in chunk_slices(len(logits), chunk)]
    return torch.cat(parts) if parts else torch.empty(0, k, device=logits.device, dtype=torch.int64)


def _best_of(source: LogitRows, tokens: slice, k: int, width: int, shard: VocabShard) -> Tensor:
    logits = source.read(tokens, shard.real_rows)
    n, rows = logits.shape
    if rows == 0:
        return torch.full((n, k), LOWEST, device=logits.device, dtype=torch.int64)
    ids = torch.arange(rows, device=logits.device)
    cut = rows // width * width
    maxima = logits if width == 1 else logits[:, :cut].unflatten(1, (-1, width)).amax(-1)
    high = maxima = source.cool(maxima, tokens)
    if width == 1:
        keys = keys_of(maxima, ids + shard.start)
    else:
        runs = ids_of(keys_of(maxima, ids[: maxima.shape[1]]).topk(k).values)
        among = (runs[..., None] * width + ids[:width]).flatten(1)
        keys = keys_of(source.cool(logits.gather(1, among), tokens), among + shard.start)
        if cut < rows:
            rest = source.cool(logits[:, cut:], tokens)
            high = torch.cat((maxima, rest), dim=1)
            keys = torch.cat((keys, keys_of(rest, ids[cut:] + shard.start)), dim=1)
    if keys.shape[1] < k:
        keys = torch.nn.functional.pad(keys, (0, k - keys.shape[1]), value=LOWEST)
    keys = keys.topk(k).values
    # NaN passes through extrema.
    finite = high.amax(-1).isfinite() & source.cool(logits.amin(-1), tokens).isfinite()
    keys[:, 0].masked_fill_(~finite, NON_FINITE)
    return keys


def partial_sums(hidden: Tensor, advantages: Tensor, support: Support, moments: Moments) -> Tensor:
    """``u_a``, ``sum_j pi_j u_j`` and ``sum_j pi_j u_j^2`` of every token, over this rank's rows j, with ``u = P(A v h) h``.

    Args:
        hidden: ``[N, H]``, any float dtype; advantages: ``[N]`` in the compute dtype.

    Returns:
        ``[N, 3]`` in the compute dtype.
    """
    updates = int(moments.steps)
    if updates == 0:
        return identity_sums(hidden, advantages, support)
    dtype = advantages.dtype
    old1, new1, old2, new2 = moments.corrected(updates + 1)
    sums = torch.zeros(len(advantages), 3, device=hidden.device, dtype=dtype)
    for pairs in support.pairs(max_pairs=MAX_PAIRS):
        weight = advantages[pairs.token] * pairs.v
        u = torch.empty_like(weight)
        for part in chunk_slices(len(weight), _rows_at_once(hidden)):
            row = pairs.row[part]
            h = hidden.index_select(0, pairs.token[part]).to(dtype)
            g = h * weight[part, None]
            first = moments.exp_avg.index_select(0, row).to(dtype).mul_(old1).add_(g, alpha=new1)
            second = moments.exp_avg_sq.index_select(0, row).to(dtype).mul_(old2).addcmul_(g, g, value=new2)
            u[part] = torch.linalg.vecdot(first.div_(second.sqrt_().add_(moments.eps)), h)
        add_sums(sums, pairs, u)
    return sums


def identity_sums(hidden: Tensor, advantages: Tensor, support: Support) -> Tensor:
    """As :func:`partial_sums` for ``P(g) = g``, where ``u = A |h|^2 v``: no work per entry on H."""
    scale = advantages * _squared_norms(hidden, advantages.dtype)
    if isinstance(support, FullSupport):
        sums = torch.zeros(len(advantages), 3, device=hidden.device, dtype=advantages.dtype)
        for pairs in support.pairs(max_pairs=MAX_PAIRS):
            add_sums(sums, pairs, scale[pairs.token] * pairs.v)
        return sums
    sums = torch.empty(len(advantages), 3, device=hidden.device, dtype=advantages.dtype)
    for tokens in chunk_slices(len(advantages), max(1, MAX_PAIRS // support.ids.shape[1])):
        probs, taken = support.probs[tokens], support.taken[tokens].to(advantages.dtype)
        u = scale[tokens, None] * (taken - probs) * support.held(tokens)
        sums[tokens] = torch.stack(((u * taken).sum(-1), (probs * u).sum(-1), (probs * u * u).sum(-1)), dim=-1)
    return sums


def add_sums(sums: Tensor, pairs: Pairs, u: Tensor) -> None:
    """Add the entries ``u [P]`` to their tokens' three sums ``[N, 3]``."""
    weighted = pairs.probs * u
    taken = torch.where(pairs.taken, u, torch.zeros_like(u))
    sums.index_add_(0, pairs.token, torch.stack((taken, weighted, weighted * u), 1))


def row_sums(entries: RowEntries, rows: Tensor, hidden: Tensor) -> Tensor:
    """Sums of the given rows.

    Args:
        rows: ``[R]`` int64, each with at least one entry, ascending.
        hidden: ``[N, c]``, the columns wanted, any float dtype.

    Returns:
        ``[R, c]`` in the dtype of the weights.
    """
    hidden = hidden.to(entries.weight.dtype)
    if len(rows) == 0:
        return hidden.new_zeros(0, hidden.shape[1])
    # Rows in between have no entries of their own, so those of the given rows are contiguous.
    starts, end = entries.offsets[rows], entries.offsets[rows[-1] + 1]
    token, weight = entries.token[starts[0] : end], entries.weight[starts[0] : end]
    return torch.nn.functional.embedding_bag(token, hidden, starts - starts[0], mode="sum", per_sample_weights=weight)


def add_row_sums(entries: RowEntries, hidden: Tensor, sums: Tensor) -> None:
    """Add every row's sum to ``sums [rows, c]``."""
    for rows in _touched(entries.counts, hidden):
        sums[rows] += row_sums(entries, rows, hidden)


def move(moments: Moments, columns: slice, rows: Tensor | None, sums: Tensor, counts: Tensor) -> None:
    """Move the moments' ``columns`` by the mean gradients ``sums / counts``; rows with a count of 0 keep theirs.

    Args:
        rows: ``[R]`` int64, distinct; None = all.
        sums: ``[R, c]``; counts: ``[R]`` int64.
    """
    for part in _touched(counts, sums):
        mean = sums.index_select(0, part).div_(counts[part, None])
        _move_rows(moments, columns, part if rows is None else rows[part], mean)


def update(moments: Moments, columns: slice, entries: RowEntries, hidden: Tensor) -> None:
    """Move the moments' ``columns`` by the mean gradients of the entries alone; ``hidden [N, c]``."""
    counts = entries.counts
    for rows in _touched(counts, hidden):
        _move_rows(moments, columns, rows, row_sums(entries, rows, hidden).div_(counts[rows, None]))


def _move_rows(moments: Moments, columns: slice, rows: Tensor, mean: Tensor) -> None:
    (beta1, beta2), squared = moments.betas, mean.square()
    for tensor, beta, new, salt in ((moments.exp_avg, beta1, mean, 0), (moments.exp_avg_sq, beta2, squared, 1)):
        part = tensor[:, columns]
        moved = part.index_select(0, rows).to(new.dtype).mul_(beta).add_(new, alpha=1 - beta)
        if tensor.dtype == torch.bfloat16:
            moved = round_to_bfloat16(moved, rows + moments.first_row, columns.start, moments.steps, salt)
        part.index_copy_(0, rows, moved)


def _touched(counts: Tensor, like: Tensor) -> Iterator[Tensor]:
    """Rows with a count, a run at a time."""
    yield from counts.nonzero()[:, 0].split(_rows_at_once(like))


def _rows_at_once(x: Tensor) -> int:
    return max(1, scratch_elements(x.device) // max(1, x.shape[1]))


def _squared_norms(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(hidden), device=hidden.device, dtype=dtype)
    for tokens in chunk_slices(len(out), _rows_at_once(hidden)):
        h = hidden[tokens].to(dtype)
        out[tokens] = torch.linalg.vecdot(h, h)
    return out
