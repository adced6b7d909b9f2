# SPDX-License-Identifier: Apache-2.0
"""Precondition-dot: hidden states, supports and moments in, three sums per token out; no row of
``P(g)`` is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from capo_verl.core.kernels.moments import Moments
from capo_verl.core.support import TopKSupport

_TILE = 2048
"""Elements of moments that one program holds at a time."""


@triton.jit
def _partial_sums_kernel(
    hidden, hidden_stride, ids, probs, actions, advantages, exp_avg, exp_avg_sq, moments_stride,
    corrected, steps, sums, directions, first_row, rows, eps,
    K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    action, advantage = tl.load(actions + token), tl.load(advantages + token)
    old1, new1 = tl.load(corrected), tl.load(corrected + 1)
    old2, new2 = tl.load(corrected + 2), tl.load(corrected + 3)
    is_identity = tl.load(steps) == 0
    hidden += token * hidden_stride
    of_taken = 0.0
    mean = 0.0
    mean_square = 0.0
    for first in range(0, K, BLOCK_K):
        entry = first + tl.arange(0, BLOCK_K)
        row = tl.load(ids + token * K + entry, mask=entry < K, other=-1)
        pi = tl.load(probs + token * K + entry, mask=entry < K, other=0.0)
        taken = row == action
        row -= first_row
        held = (row >= 0) & (row < rows)
        # Sharded vocabularies: most blocks of a support may be other ranks' rows.
        if tl.sum(held.to(tl.int32), 0) > 0:
            weight = advantage * (taken.to(tl.float32) - pi)
            products = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
            for start in range(0, H, BLOCK_H):
                column = start + tl.arange(0, BLOCK_H)
                h = tl.load(hidden + column, mask=column < H, other=0.0).to(tl.float32)
                g = weight[:, None] * h[None, :]
                if is_identity:
                    direction = g
                else:
                    there = held[:, None] & (column < H)[None, :]
                    at = row[:, None] * moments_stride + column[None, :]
                    m = tl.load(exp_avg + at, mask=there, other=0.0).to(tl.float32)
                    q = tl.load(exp_avg_sq + at, mask=there, other=1.0).to(tl.float32)
                    direction = (old1 * m + new1 * g) / (tl.sqrt(old2 * q + new2 * g * g) + eps)
                products += direction * h[None, :]
            u = tl.where(held, tl.sum(products, 1), 0.0)
            pi = tl.where(held, pi, 0.0)
            of_taken += tl.sum(tl.where(taken, u, 0.0), 0)
            mean += tl.sum(pi * u, 0)
            mean_square += tl.sum(pi * u * u, 0)
            if KEEP:
                tl.store(directions + token * K + entry, u, mask=entry < K)
    tl.store(sums + token * 3, of_taken)
    tl.store(sums + token * 3 + 1, mean)
    tl.store(sums + token * 3 + 2, mean_square)


def blocks(k: int, hidden_size: int) -> tuple[int, int]:
    """Entries and columns of a program's tile."""
    columns = min(256, triton.next_power_of_2(hidden_size))
    return min(triton.next_power_of_2(k), _TILE // columns), columns


def launch_partial_sums(
    hidden: Tensor,
    advantages: Tensor,
    support: TopKSupport,
    moments: Moments,
    directions: Tensor | None = None,
) -> Tensor:
    """Arguments and result of ``plain.partial_sums`` in float32 arithmetic; one program per
    token.
    """
    n, k = support.ids.shape
    sums = torch.empty(n, 3, device=hidden.device, dtype=torch.float32)
    if n == 0:
        return sums
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    if directions is not None:
        directions.zero_()  # blocks of other ranks' rows are left out
    corrected = torch.stack(moments.corrected((moments.steps + 1).double())).float()
    block_k, block_h = blocks(k, hidden.shape[1])
    _partial_sums_kernel[(n,)](
        hidden, hidden.stride(0), support.ids.contiguous(), support.probs.contiguous(),
        support.actions.contiguous(),
        advantages.contiguous(), moments.exp_avg, moments.exp_avg_sq, moments.exp_avg.stride(0),
        corrected, moments.steps,
        sums, sums if directions is None else directions, support.shard.start, support.shard.rows,
        moments.eps,
        K=k, H=hidden.shape[1], BLOCK_K=block_k, BLOCK_H=block_h, KEEP=directions is not None,
    )  # fmt: skip
    return sums
