# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding of float32 to bfloat16, the same on every rank and in every repetition.

Adam's second moment moves by a thousandth of its distance per step (``1 - beta2``), less than
bfloat16 resolves: rounded to nearest, small steps are lost and the sum of a test's moments was 4.5
% off after 300 steps. Rounded up with the probability of the remainder, its expectation is exact.
The random bits are a hash of (row, column, step, salt), so neither sharding nor a resume changes
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd 64-bit constants; products wrap around. The finaliser is that of splitmix64 (Steele, Lea,
# Flood 2014).
ROW, COLUMN, STEP, SALT = (
    0x1E3779B97F4A7C15,
    0x3F58476D1CE4E5B9,
    0x14D049BB133111EB,
    0x2545F4914F6CDD1D,
)
MIX1, MIX2 = 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


def round_to_bfloat16(
    x: Tensor, rows: Tensor, first_column: int, step: Tensor, salt: int
) -> Tensor:
    """``[r, c]`` float32 to bfloat16, up or down with probabilities that keep the expectation.

    Args:
        rows: ``[r]`` int64, global row of each row of ``x``; first_column: of the moments' H, of
            the first column of ``x``.
        step: scalar int64, salt: vary the random bits over time and between tensors.
    """
    columns = torch.arange(first_column, first_column + x.shape[1], device=x.device)
    at = rows[:, None] * ROW + columns * COLUMN + (step * STEP + salt * SALT)
    at = (at ^ (at >> 30)) * MIX1
    at = (at ^ (at >> 27)) * MIX2
    random = ((at >> 31) & 0xFFFF).int()
    bits = (x.float().contiguous().view(torch.int32) + random) & -0x10000
    return bits.view(torch.float32).bfloat16()
