# SPDX-License-Identifier: Apache-2.0
"""Support: the candidates for the k largest logits of a token, in two passes over its logits and
without a sort of them.

The first pass takes the maxima of interleaved groups of columns. The k-th largest of these is a
bound that at least k logits reach, and with groups many times k hardly more do: the second pass
collects them. Should they not fit, which takes logits that are large at a regular distance or
nearly all equal, the bound is raised by bisection over the 64-bit keys, which are distinct.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from capo_verl.core.keys import LOWEST, NON_FINITE

MAX_K = 1024
"""Largest support."""
GROUPS = 2048
"""Groups of the first pass, more than ``MAX_K``; as many logits are read at a time."""


@triton.jit
def _cooled(x, temperature, HAS_TEMPERATURE: tl.constexpr):
    if HAS_TEMPERATURE:
        # As the trainer divides: in float32, rounded to the dtype of the temperature.
        quotient = tl.div_rn(x.to(tl.float32), temperature.to(tl.float32))
        if temperature.dtype == tl.bfloat16:
            # By hand, because Triton's interpreter cuts instead of rounding.
            bits = quotient.to(tl.int32, bitcast=True)
            return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        return quotient.to(temperature.dtype).to(tl.float32)
    return x.to(tl.float32)


@triton.jit
def _key(logit, token_id):
    bits = tl.where(logit == 0, 0.0, logit).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - token_id.to(tl.int64))


@triton.jit
def _logit_and_id(key):
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def _kth_largest(x, K: tl.constexpr):
    """Bit by bit: the largest number that K elements reach. A sort of all would cost more."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    bound = tl.full([], -0x80000000, tl.int64)
    step = tl.full([], 0x80000000, tl.int64)
    for _ in range(32):
        trial = bound + step
        step >>= 1
        bound = tl.where(tl.sum((ordered >= trial).to(tl.int32), 0) >= K, trial, bound)
    bits = bound.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best_keys_kernel(
    logits, logits_stride, positions, temperatures, keys, first_id,
    ROWS: tl.constexpr, K: tl.constexpr, WANTED: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr, LOWEST: tl.constexpr,
    NON_FINITE: tl.constexpr, HAS_POSITIONS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, CAPACITY)
    keys += token * CAPACITY
    position = token
    if HAS_POSITIONS:
        position = tl.load(positions + token)
    if position < 0:
        tl.store(keys + slots, tl.full([CAPACITY], LOWEST, tl.int64))
        return
    logits += position * logits_stride
    temperature = 1.0
    if HAS_TEMPERATURE:
        temperature = tl.load(temperatures + token)
    lanes = tl.arange(0, BLOCK)
    infinity = float("inf")

    high = tl.full([BLOCK], -infinity, tl.float32)
    low = tl.full([BLOCK], infinity, tl.float32)
    unusable = tl.zeros([BLOCK], tl.int32)
    for first in range(0, ROWS, BLOCK):
        inside = first + lanes < ROWS
        x = tl.load(logits + first + lanes, mask=inside, other=0.0).to(tl.float32)
        unusable |= tl.where(tl.abs(x) < infinity, 0, 1)  # NaN is not less than anything
        high = tl.maximum(high, tl.where(inside, x, -infinity))
        low = tl.minimum(low, tl.where(inside, x, infinity))
    bound = _kth_largest(high, K)
    highest = tl.max(high, 0)
    lowest = tl.min(low, 0)
    if HAS_TEMPERATURE:
        # Division by a positive number keeps the order.
        bound = _cooled(bound, temperature, HAS_TEMPERATURE)
        highest = _cooled(highest, temperature, HAS_TEMPERATURE)
        lowest = _cooled(lowest, temperature, HAS_TEMPERATURE)
    usable = (tl.sum(unusable, 0) == 0) & (tl.abs(highest) < infinity) & (tl.abs(lowest) < infinity)

    lower = _key(bound, tl.full([], 0xFFFFFFFF, tl.int64))
    upper = tl.full([], NON_FINITE, tl.int64)
    middle = lower
    count = 0
    searching = usable
    while searching:
        bound, bound_id = _logit_and_id(middle)
        count = 0
        for first in range(0, ROWS, BLOCK):
            inside = first + lanes < ROWS
            x = _cooled(
                tl.load(logits + first + lanes, mask=inside, other=0.0),
                temperature,
                HAS_TEMPERATURE,
            )
            token_id = first_id + first + lanes
            chosen = inside & ((x > bound) | ((x == bound) & (token_id <= bound_id)))
            found = tl.sum(chosen.to(tl.int32), 0)
            if found > 0:
                slot = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
                tl.store(keys + slot, _key(x, token_id), mask=chosen & (slot < CAPACITY))
                count += found
        searching = (count > CAPACITY) | (count < WANTED)
        if count > CAPACITY:
            lower = middle
        else:
            upper = middle
        middle = (lower >> 1) + (upper >> 1) + (lower & upper & 1)
        tl.debug_barrier()  # what follows writes slots again that other threads have written
    if not usable:
        count = 0
    tl.store(
        keys + slots, tl.where((slots == 0) & (count == 0), NON_FINITE, LOWEST), mask=slots >= count
    )


def constants(k: int, rows: int) -> dict[str, int]:
    """Constants of the kernel, for a support of ``k`` out of ``rows``."""
    capacity = max(128, triton.next_power_of_2(2 * k))
    return {"ROWS": rows, "K": k, "WANTED": min(k, rows), "CAPACITY": capacity, "BLOCK": GROUPS}


def launch_best_keys(
    logits: Tensor,
    positions: Tensor | None,
    temperature: Tensor | None,
    k: int,
    rows: int,
    first_id: int,
) -> Tensor:
    """Keys of the candidates of each token, among them the k best.

    Args:
        logits: ``[M, >= rows]``, the last dimension contiguous.
        positions: ``[N]`` int64, which of the M; negative: a token without candidates.
        temperature: ``[N]`` in the dtype of the logits, or float32.

    Returns:
        ``[N, c]`` int64 with c >= k, in no order; ``NON_FINITE`` is among them where a logit is not
        finite.
    """
    n = len(logits if positions is None else positions)
    sizes = constants(k, rows)
    keys = torch.empty(n, sizes["CAPACITY"], device=logits.device, dtype=torch.int64)
    if n:
        _best_keys_kernel[(n,)](
            logits, logits.stride(0), positions, temperature, keys, first_id, **sizes,
            LOWEST=LOWEST, NON_FINITE=NON_FINITE, HAS_POSITIONS=positions is not None,
            HAS_TEMPERATURE=temperature is not None,
        )  # fmt: skip
    return keys
