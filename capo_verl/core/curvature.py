# SPDX-License-Identifier: Apache-2.0
"""Predicted shifts of the objective (m_H) and of the policy (m_F) from three sums per token.

With ``u = P(g) h``, ``d = v.u``, ``e = sum_j pi_j u_j`` and ``s = sum_j pi_j u_j^2``:

    m_H = lr * A * d + lr^2/2 * A * (d^2 - (s - e^2))     gradient and Hessian term
    m_F = lr^2/2 * d^2                                    sampled Fisher form, ~ KL
    m_F = lr^2/2 * (s - e^2)                              exact: expectation over the actions

(arXiv 2510.00819, sections 3 and 4, in closed form.) As ``d = u_a - e`` for the taken token ``a``
(``u_a = 0`` outside the support), the sums ``u_a, e, s`` over this rank's rows and one all-reduce
of ``[N, 3]`` are all that is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.chunks import chunk_slices, scratch_elements
from capo_verl.core.kernels import plain
from capo_verl.core.kernels.entries import sort_by_row
from capo_verl.core.optimizer_model import OptimizerModel
from capo_verl.core.support import Pairs, Support


class Shifts(NamedTuple):
    """m_H and m_F, of tokens or of sets of tokens."""

    objective: Tensor
    policy: Tensor


def token_shifts(
    model: OptimizerModel,
    support: Support,
    hidden: Tensor,
    advantages: Tensor,
    learning_rate: float,
    tp_group: collectives.Group,
    exact: bool = False,
) -> Shifts:
    """Shifts of every token along its own gradient.

    Args:
        hidden: ``[N, H]``, any float dtype; advantages: ``[N]`` in the compute dtype.
        exact: m_F is the exact Fisher form instead of the sampled one.

    Returns:
        Two ``[N]`` in the compute dtype.
    """
    sums = model.partial_sums(hidden, advantages, support)
    collectives.sum_(sums, (tp_group,))
    return shifts_of(sums, advantages, learning_rate, exact=exact)


def set_shifts(
    model: OptimizerModel,
    support: Support,
    hidden: Sequence[Tensor],
    advantages: Tensor,
    include: Tensor,
    group: Tensor,
    n_groups: int,
    learning_rate: float,
    tp_group: collectives.Group,
    reduce_groups: Sequence[collectives.Group] = (),
    exact: bool = False,
) -> Shifts:
    """Shifts of every included token along the direction of its whole set.

    The direction of a set is ``P(G)``, ``G_j`` the mean of ``g_j`` over the set's tokens whose
    support holds row j. It is built a few columns of H at a time, for all sets at once, so scratch
    memory does not grow with ``H * tokens``.

    Args:
        hidden: one or several ``[n_i, H]`` that follow each other, N tokens in all.
        advantages: ``[N]`` in the compute dtype; include: ``[N]`` bool; group: ``[N]`` int64, the
            set of each token.
        n_groups: number of sets.
        reduce_groups: groups over which the tokens of a set are spread; needs ``n_groups == 1``.
        exact: as for :func:`token_shifts`.

    Returns:
        Two ``[N]`` in the compute dtype; positions outside ``include`` hold zeros.
    """
    dtype, device = advantages.dtype, advantages.device
    rows_per_rank = support.shard.rows
    pairs = support.pairs(include)
    key = group[pairs.token] * rows_per_rank + pairs.row
    # Segments: the (set, row) combinations that occur anywhere.
    if n_groups == 1:
        count = collectives.sum_(torch.bincount(key, minlength=rows_per_rank), reduce_groups)
        segments = count.nonzero()[:, 0]
        segment_of = torch.zeros_like(count)
        segment_of[segments] = torch.arange(len(segments), device=device)
        segment, count = segment_of[key], count[segments]
    else:
        segments, segment, count = key.unique(return_inverse=True, return_counts=True)
    segment_rows, segment_groups = segments % rows_per_rank, segments // rows_per_rank
    weight = advantages[pairs.token] * pairs.v
    entries = sort_by_row(
        segment[:, None], weight[:, None], torch.ones_like(pairs.taken), len(segments)
    )
    entries = entries._replace(token=pairs.token[entries.token])

    u = torch.zeros_like(weight)
    inner = torch.zeros(n_groups, device=device, dtype=dtype)
    width = max(1, scratch_elements(device) // max(1, len(segments)))
    for columns in chunk_slices(hidden[0].shape[1], width):
        h = torch.cat([part[:, columns].to(dtype) for part in hidden])
        gradient = torch.zeros(len(segments), h.shape[1], device=device, dtype=dtype)
        plain.add_row_sums(entries, h, gradient)
        collectives.sum_(gradient, reduce_groups).div_(count[:, None])
        direction = model.precondition(segment_rows, gradient, columns)
        inner.index_add_(0, segment_groups, torch.linalg.vecdot(gradient, direction))
        for part in _pair_chunks(pairs, h):
            u[part] += torch.linalg.vecdot(direction[segment[part]], h[pairs.token[part]])

    sums = torch.zeros(len(advantages), 3, device=device, dtype=dtype)
    weighted, taken = pairs.probs * u, torch.where(pairs.taken, u, torch.zeros_like(u))
    sums.index_add_(0, pairs.token, torch.stack((taken, weighted, weighted * u), 1))
    collectives.sum_(sums, (tp_group,))
    collectives.sum_(inner, (tp_group,))
    shifts = shifts_of(sums, advantages, learning_rate, learning_rate * inner[group], exact)
    zero = torch.zeros((), device=device, dtype=dtype)
    return Shifts(
        torch.where(include, shifts.objective, zero), torch.where(include, shifts.policy, zero)
    )


def sequence_sums(
    shifts: Shifts, include: Tensor, sequence: Tensor, n_sequences: int
) -> tuple[Shifts, Tensor]:
    """Sums of token shifts per sequence and the number of tokens summed: ``[S]`` each."""
    weight = include.to(shifts.policy.dtype)

    def total(x: Tensor) -> Tensor:
        return torch.zeros(n_sequences, device=x.device, dtype=x.dtype).index_add_(0, sequence, x)

    objective, policy = (total(torch.where(include, x, torch.zeros_like(x))) for x in shifts)
    return Shifts(objective, policy), total(weight)


def _pair_chunks(pairs: Pairs, hidden: Tensor) -> Iterator[slice]:
    return chunk_slices(
        len(pairs.token), max(1, scratch_elements(hidden.device) // max(1, hidden.shape[1]))
    )


def shifts_of(
    sums: Tensor,
    advantages: Tensor,
    learning_rate: float,
    linear: Tensor | None = None,
    exact: bool = False,
) -> Shifts:
    """m_H and m_F from the three sums ``[N, 3]`` over all rows; ``linear [N]``: first term of m_H,
    if not the token's own.
    """
    u_taken, mean, mean_square = sums.unbind(-1)
    d = u_taken - mean
    if linear is None:
        linear = learning_rate * advantages * d
    half = 0.5 * learning_rate**2
    variance = mean_square - mean**2
    # A variance, but as a difference it may round to below 0.
    policy = variance.clamp(min=0) if exact else d**2
    return Shifts(linear + half * advantages * (d**2 - variance), half * policy)
