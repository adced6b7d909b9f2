# SPDX-License-Identifier: Apache-2.0
"""The kernels in plain torch: for every device and dtype, a run of tokens or rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from capo_verl.core.chunks import chunk_slices, scratch_elements
from capo_verl.core.kernels.entries import RowEntries
from capo_verl.core.kernels.moments import Moments
from capo_verl.core.kernels.rounding import round_to_bfloat16
from capo_verl.core.keys import LOWEST, NON_FINITE, keys_of
from capo_verl.core.logits import LogitRows, VocabShard
from capo_verl.core.support import Block, Support, TopKSupport

BLOCK_ENTRIES = 1 << 18
"""Entries of supports worked on at a time: what is kept per entry stays small."""
TILE_ELEMENTS = 1 << 16
"""Elements of the moments worked on at a time: they and what is made of them stay in a core's
cache.
"""


def best_keys(logits: LogitRows, k: int, shard: VocabShard) -> Tensor:
    """The ``k`` best rows of every token, best first.

    Rows are cut into runs of S. The k largest of all lie in the k runs with the largest maxima, of
    equal maxima the lower
    run: were an element outside of them, each of the k runs would hold one that comes before it. So
        a pass over the logits
    that only takes maxima leaves ``rows / S`` and then ``k S`` candidates to choose from.

    Args:
        logits: of N tokens, no wider than float32.

    Returns:
        ``[N, k]`` int64 keys (``keys.py``); ``LOWEST`` where the shard has fewer rows,
        ``NON_FINITE`` in the first column if a logit of the token is not finite.
    """
    rows = shard.real_rows
    width = 1 << round(math.log2(rows / k) / 2) if rows > 8 * k else 1
    chunk = max(1, 4 * scratch_elements(logits.device) // max(shard.rows, k * width))
    keys = torch.empty(len(logits), k, device=logits.device, dtype=torch.int64)
    for tokens in chunk_slices(len(logits), chunk):
        keys[tokens] = _best_of(logits, tokens, k, width, shard) if rows else LOWEST
    return keys


def _best_of(source: LogitRows, tokens: slice, k: int, width: int, shard: VocabShard) -> Tensor:
    logits = source.read(tokens, shard.real_rows)
    rows = logits.shape[1]
    cut = rows // width * width
    maxima = logits if width == 1 else logits[:, :cut].unflatten(1, (-1, width)).amax(-1)
    maxima, rest = source.cool(maxima, tokens).float(), source.cool(logits[:, cut:], tokens).float()
    run = torch.arange(maxima.shape[1], device=logits.device)
    if width == 1:
        keys = keys_of(maxima, run + shard.start)
        keys = torch.nn.functional.pad(keys, (0, max(0, k - rows)), value=LOWEST).topk(k).values
    else:
        runs = _largest(maxima, run, k)
        # Index arithmetic on rows of S: gather would look up every element.
        among = logits[:, :cut].unflatten(1, (-1, width))[
            torch.arange(len(runs), device=runs.device)[:, None], runs
        ]
        among = torch.cat((source.cool(among, tokens).float().flatten(1), rest), dim=1)
        ids = (runs[..., None] * width + torch.arange(width, device=runs.device)).flatten(1)
        ids = torch.cat(
            (ids, torch.arange(cut, rows, device=ids.device).expand(len(ids), -1)), dim=1
        )
        at = _largest(among, ids, k)
        keys = (
            keys_of(among.gather(1, at), ids.gather(1, at) + shard.start)
            .sort(descending=True)
            .values
        )
    # NaN passes through extrema.
    high, low = torch.cat((maxima, rest), dim=1).amax(-1), source.cool(logits.amin(-1), tokens)
    keys[:, 0].masked_fill_(~(high.isfinite() & low.isfinite()), NON_FINITE)
    return keys


def _largest(values: Tensor, ids: Tensor, k: int) -> Tensor:
    """``[n, k]`` int64, where the k largest ``values [n, m]`` are; of equal ones those of lower
    ``ids [..., m]``.

    Comparing floats is several times as fast as comparing keys, and says when it was not enough.
    """
    found = values.topk(min(k + 1, values.shape[1]))
    at = found.indices[:, :k]
    if values.shape[1] > k:
        tied = (found.values[:, k] == found.values[:, k - 1]).nonzero()[:, 0]
        if len(tied):
            at[tied] = keys_of(values[tied], ids if ids.dim() == 1 else ids[tied]).topk(k).indices
    return at


def partial_sums(
    hidden: Tensor,
    advantages: Tensor,
    support: Support,
    moments: Moments,
    directions: Tensor | None = None,
) -> Tensor:
    """``u_a``, ``sum_j pi_j u_j`` and ``sum_j pi_j u_j^2`` of every token, over this rank's rows j,
    with ``u = P(A v h) h``.

    Args:
        hidden: ``[N, H]``, any float dtype; advantages: ``[N]`` in the compute dtype.
        directions: if given, ``[N, k]`` (``[N, real rows]`` of a whole vocabulary), filled with u;
            0 for other ranks' rows.

    Returns:
        ``[N, 3]`` in the compute dtype.
    """
    updates = int(moments.steps)
    if updates == 0:
        return identity_sums(hidden, advantages, support, directions)
    old1, new1, old2, new2 = moments.corrected(updates + 1)
    # old x + new y as old (x + new / old y): one pass over x instead of two.
    ratios = new1 / old1 if old1 else new1, new2 / old2 if old2 else new2
    scales = old1 or 1.0, math.sqrt(old2) or 1.0
    keep = old1 > 0, old2 > 0
    sums = torch.zeros(len(advantages), 3, device=hidden.device, dtype=advantages.dtype)
    tile = _Tile(hidden.shape[1], hidden.device, advantages.dtype)
    # Of a whole vocabulary a tile's worth at a time: its rows of the moments are gathered at once.
    entries = (
        BLOCK_ENTRIES
        if isinstance(support, TopKSupport)
        else max(1, TILE_ELEMENTS // hidden.shape[1])
    )
    for block in support.blocks(entries, dense=directions is None):
        weight, h = (
            _weights(advantages, block)[..., None],
            hidden[block.tokens].to(advantages.dtype),
        )
        gradient = weight * ratios[0], h[:, None]
        squared = weight.square() * ratios[1], h.square()[:, None]
        u = torch.empty_like(weight)
        for part in chunk_slices(len(u), tile.tokens(u.shape[1])):
            first, second = tile.gather(moments, block.row[part])
            for x, (a, b), is_kept in ((first, gradient, keep[0]), (second, squared, keep[1])):
                if is_kept:
                    x.addcmul_(a[part], b[part])
                else:
                    torch.mul(a[part], b[part], out=x)
            first.div_(second.sqrt_().add_(moments.eps / scales[1]))
            torch.bmm(first, h[part, :, None], out=u[part])
        _add_sums(sums, block, u[..., 0].mul_(scales[0] / scales[1]), support, directions)
    return sums


def identity_sums(
    hidden: Tensor, advantages: Tensor, support: Support, directions: Tensor | None = None
) -> Tensor:
    """The sums of :func:`partial_sums` for ``P(g) = g``: ``u = A |h|^2 v``, no work per entry
    on H.
    """
    sums = torch.zeros(len(advantages), 3, device=hidden.device, dtype=advantages.dtype)
    norms = _squared_norms(hidden, advantages.dtype)
    for block in support.blocks(BLOCK_ENTRIES):
        _add_sums(
            sums,
            block,
            norms[block.tokens, None] * _weights(advantages, block),
            support,
            directions,
        )
    return sums


def _weights(advantages: Tensor, block: Block) -> Tensor:
    """A v: ``[n, c]``"""
    return advantages[block.tokens, None] * (block.taken.to(block.probs.dtype) - block.probs)


def _add_sums(
    sums: Tensor, block: Block, u: Tensor, support: Support, directions: Tensor | None
) -> None:
    u = torch.where(block.held, u, 0)
    if isinstance(support, TopKSupport) and directions is not None:
        directions[block.tokens] = u
    elif directions is not None:
        directions[block.tokens].scatter_(1, block.row, u)
    weighted = block.probs * u
    of_taken = torch.where(block.taken, u, 0)
    sums[block.tokens] += torch.stack(
        (of_taken.sum(-1), weighted.sum(-1), (weighted * u).sum(-1)), dim=-1
    )


class _Tile:
    """Memory for gathered moments, taken once: what the allocator returns to the system costs more
    than the arithmetic.
    """

    def __init__(self, hidden_size: int, device: torch.device, dtype: torch.dtype):
        self._hidden_size = hidden_size
        self._memory = torch.empty(2, 0, hidden_size, device=device, dtype=dtype)

    def tokens(self, entries: int) -> int:
        """Number of tokens of so many entries to work on at a time."""
        return max(1, TILE_ELEMENTS // (entries * self._hidden_size))

    def gather(self, moments: Moments, row: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of the rows ``row [n, c]``: ``[n, c, H]`` in the compute dtype, valid until
        the next call.
        """
        flat = row.flatten()
        if self._memory.shape[1] < len(flat):
            self._memory = self._memory.new_empty(2, len(flat), self._hidden_size)
        first, second = self._memory[0, : len(flat)], self._memory[1, : len(flat)]
        for x, memory in ((moments.exp_avg, first), (moments.exp_avg_sq, second)):
            if x.dtype == memory.dtype:
                torch.index_select(x, 0, flat, out=memory)
            else:
                memory.copy_(x.index_select(0, flat))
        return first.view(*row.shape, -1), second.view(*row.shape, -1)


def row_sums(entries: RowEntries, rows: Tensor, hidden: Tensor) -> Tensor:
    """Sums of the given rows.

    Args:
        rows: ``[R]`` int64, ascending; every row between the first and the last that has entries is
            among them.
        hidden: ``[N, c]``, the columns wanted, any float dtype.

    Returns:
        ``[R, c]`` in the dtype of the weights.
    """
    hidden = hidden.to(entries.weight.dtype)
    if len(rows) == 0:
        return hidden.new_zeros(0, hidden.shape[1])
    # So the entries of the given rows follow each other.
    starts, end = entries.offsets[rows], entries.offsets[rows[-1] + 1]
    token, weight = entries.token[starts[0] : end], entries.weight[starts[0] : end]
    return torch.nn.functional.embedding_bag(
        token, hidden, starts - starts[0], mode="sum", per_sample_weights=weight
    )


def add_row_sums(entries: RowEntries, hidden: Tensor, sums: Tensor) -> None:
    """Add every row's sum to ``sums [rows, c]``."""
    for rows in _touched(entries.counts, hidden):
        sums[rows] += row_sums(entries, rows, hidden)


def move(
    moments: Moments, columns: slice, rows: Tensor | None, sums: Tensor, counts: Tensor
) -> None:
    """Move the moments' ``columns`` by the mean gradients ``sums / counts``; rows with a count of 0
    keep theirs.

    Args:
        rows: ``[R]`` int64, distinct; None = all.
        sums: ``[R, c]``; counts: ``[R]`` int64.
    """
    for part in _touched(counts, sums):
        mean = sums.index_select(0, part).div_(counts[part, None])
        _move_rows(moments, columns, part if rows is None else rows[part], mean)


def update(moments: Moments, columns: slice, entries: RowEntries, hidden: Tensor) -> None:
    """Move the moments' ``columns`` by the mean gradients of the entries alone; ``hidden [N,
    c]``.
    """
    counts = entries.counts
    for rows in _touched(counts, hidden):
        _move_rows(moments, columns, rows, row_sums(entries, rows, hidden).div_(counts[rows, None]))


def _move_rows(moments: Moments, columns: slice, rows: Tensor, mean: Tensor) -> None:
    (beta1, beta2), squared = moments.betas, mean.square()
    for tensor, beta, new, salt in (
        (moments.exp_avg, beta1, mean, 0),
        (moments.exp_avg_sq, beta2, squared, 1),
    ):
        part = tensor[:, columns]
        moved = part.index_select(0, rows).to(new.dtype).mul_(beta).add_(new, alpha=1 - beta)
        if tensor.dtype == torch.bfloat16:
            moved = round_to_bfloat16(
                moved, rows + moments.first_row, columns.start, moments.steps, salt
            )
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
