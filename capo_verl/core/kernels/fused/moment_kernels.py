# SPDX-License-Identifier: Apache-2.0
"""Sums of the accepted gradients per vocabulary row, and the moments moved by their means.

A program owns some columns of one row. It adds the row's entries in their order, so results do not
vary from run to run and nothing is added atomically; a row without entries costs it the look at two
offsets.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from capo_verl.core.kernels import rounding
from capo_verl.core.kernels.entries import RowEntries
from capo_verl.core.kernels.moments import Moments

BLOCK_ENTRIES = 16
BLOCK_H = 256

_ROW, _COLUMN, _STEP, _SALT = (
    tl.constexpr(x) for x in (rounding.ROW, rounding.COLUMN, rounding.STEP, rounding.SALT)
)
_MIX1, _MIX2 = tl.constexpr(rounding.MIX1), tl.constexpr(rounding.MIX2)


@triton.jit
def _sum_of_row(
    token, weight, hidden, hidden_stride, start, end, column, columns,
    BLOCK_ENTRIES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([BLOCK_H], tl.float32)
    while start < end:
        entry = start + tl.arange(0, BLOCK_ENTRIES)
        at = tl.load(token + entry, mask=entry < end, other=0)
        w = tl.load(weight + entry, mask=entry < end, other=0.0)
        there = (entry < end)[:, None] & (column < columns)[None, :]
        h = tl.load(hidden + at[:, None] * hidden_stride + column[None, :], mask=there, other=0.0)
        total += tl.sum(w[:, None] * h.to(tl.float32), 0)
        start += BLOCK_ENTRIES
    return total


@triton.jit
def _rounded(x, row, column, step, SALT: tl.constexpr):
    """``rounding.round_to_bfloat16``, bit for bit."""
    at = row * _ROW + column.to(tl.int64) * _COLUMN + (step * _STEP + SALT * _SALT)
    at = (at ^ (at >> 30)) * _MIX1
    at = (at ^ (at >> 27)) * _MIX2
    random = ((at >> 31) & 0xFFFF).to(tl.int32)
    bits = (x.to(tl.int32, bitcast=True) + random) & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _move_row(
    g, exp_avg, exp_avg_sq, stride, row, first_row, column, first_column, columns, beta1, rest1,
    beta2, rest2, steps, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    at = row * stride + first_column + column
    first = (
        beta1 * tl.load(exp_avg + at, mask=column < columns, other=0.0).to(tl.float32) + rest1 * g
    )
    second = (
        beta2 * tl.load(exp_avg_sq + at, mask=column < columns, other=0.0).to(tl.float32)
        + rest2 * g * g
    )
    if STOCHASTIC:
        step = tl.load(steps)
        first = _rounded(first, first_row + row, first_column + column, step, 0)
        second = _rounded(second, first_row + row, first_column + column, step, 1)
    tl.store(exp_avg + at, first.to(exp_avg.dtype.element_ty), mask=column < columns)
    tl.store(exp_avg_sq + at, second.to(exp_avg_sq.dtype.element_ty), mask=column < columns)


@triton.jit
def _row_sums_kernel(
    token, weight, offsets, rows, hidden, hidden_stride, columns, sums, sums_stride,
    ALL_ROWS: tl.constexpr, ADD: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    out = tl.program_id(0).to(tl.int64)
    row = out
    if not ALL_ROWS:
        row = tl.load(rows + out)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if (not ADD) | (start < end):
        total = _sum_of_row(
            token, weight, hidden, hidden_stride, start, end, column, columns, BLOCK_ENTRIES,
            BLOCK_H
        )  # fmt: skip
        at = sums + out * sums_stride + column
        if ADD:
            total += tl.load(at, mask=column < columns)
        tl.store(at, total, mask=column < columns)


@triton.jit
def _update_kernel(
    token, weight, offsets, hidden, hidden_stride, columns, first_column,
    exp_avg, exp_avg_sq, stride, first_row, beta1, rest1, beta2, rest2, steps,
    STOCHASTIC: tl.constexpr, BLOCK_ENTRIES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    if start < end:
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        total = _sum_of_row(
            token, weight, hidden, hidden_stride, start, end, column, columns, BLOCK_ENTRIES,
            BLOCK_H
        )  # fmt: skip
        mean = total / (end - start).to(tl.float32)
        _move_row(
            mean, exp_avg, exp_avg_sq, stride, row, first_row, column, first_column, columns, beta1,
            rest1, beta2, rest2, steps, STOCHASTIC,
        )  # fmt: skip


@triton.jit
def _move_kernel(
    sums, sums_stride, counts, rows, columns, first_column,
    exp_avg, exp_avg_sq, stride, first_row, beta1, rest1, beta2, rest2, steps,
    ALL_ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    source = tl.program_id(0).to(tl.int64)
    row = source
    if not ALL_ROWS:
        row = tl.load(rows + source)
    count = tl.load(counts + source)
    if count > 0:
        column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        total = tl.load(sums + source * sums_stride + column, mask=column < columns, other=0.0)
        _move_row(
            total / count.to(tl.float32), exp_avg, exp_avg_sq, stride, row, first_row, column,
            first_column, columns, beta1, rest1, beta2, rest2, steps, STOCHASTIC,
        )  # fmt: skip


def launch_row_sums(
    entries: RowEntries, rows: Tensor | None, hidden: Tensor, sums: Tensor, add: bool
) -> None:
    """``sums [R, c]`` become, or with ``add`` grow by, the sums of ``rows`` (None: all).

    ``hidden [N, c]``.
    """
    if len(sums) == 0:
        return
    hidden = _columns_contiguous(hidden)
    _row_sums_kernel[_grid(len(sums), hidden.shape[1])](
        entries.token, entries.weight, entries.offsets, rows, hidden, hidden.stride(0),
        hidden.shape[1], sums, sums.stride(0),
        ALL_ROWS=rows is None, ADD=add, BLOCK_ENTRIES=BLOCK_ENTRIES, BLOCK_H=BLOCK_H,
    )  # fmt: skip


def launch_update(moments: Moments, columns: slice, entries: RowEntries, hidden: Tensor) -> None:
    """Arguments as ``plain.update``: every row with entries, sums and moments in one go."""
    hidden = _columns_contiguous(hidden)
    _update_kernel[_grid(len(moments.exp_avg), hidden.shape[1])](
        entries.token, entries.weight, entries.offsets, hidden, hidden.stride(0), hidden.shape[1],
        columns.start,
        moments.exp_avg, moments.exp_avg_sq, moments.exp_avg.stride(0), moments.first_row,
        *_decay(moments), moments.steps,
        STOCHASTIC=_is_stochastic(moments), BLOCK_ENTRIES=BLOCK_ENTRIES, BLOCK_H=BLOCK_H,
    )  # fmt: skip


def launch_move(
    moments: Moments, columns: slice, rows: Tensor | None, sums: Tensor, counts: Tensor
) -> None:
    """Arguments as ``plain.move``."""
    if len(sums) == 0:
        return
    _move_kernel[_grid(len(sums), sums.shape[1])](
        sums, sums.stride(0), counts, rows, sums.shape[1], columns.start,
        moments.exp_avg, moments.exp_avg_sq, moments.exp_avg.stride(0), moments.first_row,
        *_decay(moments), moments.steps,
        ALL_ROWS=rows is None, STOCHASTIC=_is_stochastic(moments), BLOCK_H=BLOCK_H,
    )  # fmt: skip


def _decay(moments: Moments) -> tuple[float, float, float, float]:
    """beta and 1 - beta of both moments.

    Subtracted in float32, as the kernel would, 1 - 0.999 is off by 1e-5 of itself.
    """
    beta1, beta2 = moments.betas
    return beta1, 1 - beta1, beta2, 1 - beta2


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return rows, triton.cdiv(columns, BLOCK_H)


def _columns_contiguous(hidden: Tensor) -> Tensor:
    return hidden if hidden.stride(1) == 1 else hidden.contiguous()


def _is_stochastic(moments: Moments) -> bool:
    return moments.exp_avg.dtype == torch.bfloat16
