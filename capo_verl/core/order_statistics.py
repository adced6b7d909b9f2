# SPDX-License-Identifier: Apache-2.0
"""Exact order statistics of values spread over ranks, without the host ever knowing how many there
are.

Floats are mapped to integers of the same order. One rank sorts them and looks up the ranks asked
for. Several ranks sort their own and find each answer a byte at a time: how many keys lie at or
below each of 256 bounds, summed over all ranks, says which of the 256 intervals holds it. Nothing
has to have the same length on all ranks, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.keys import flip_negative

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_RADIX_BITS = 8


def ordered_keys(values: Tensor, valid: Tensor) -> Tensor:
    """Integers in the order of ``values``, NaN above infinity; the largest integer where ``valid``
    is False.

    Args:
        values: ``[..., M]``, any float dtype; valid: bool, broadcastable to it.

    Returns:
        ``[..., M]`` int64 for float64, else int32.
    """
    values = values if values.dtype == torch.float64 else values.float()
    # + 0.0 makes -0.0 equal 0.0; NaN comes in many bit patterns.
    bits = torch.where(values.isnan(), torch.nan, values + 0.0).view(_INTEGERS[values.dtype])
    return torch.where(valid, flip_negative(bits), torch.iinfo(bits.dtype).max)


def nearest_rank(
    keys: Tensor, count: Tensor, fractions: Sequence[float], groups: Sequence[collectives.Group]
) -> Tensor:
    """The value at position ``round(q * (count - 1))`` of the sorted valid values of all ranks, for
    every q. Collective.

    Args:
        keys: ``[R, M]`` from :func:`ordered_keys`: R independent sets of values; M may differ
            between ranks, and be 0.
        count: scalar, number of valid values of each set on all ranks together.
        fractions: Q numbers in 0..1.

    Returns:
        ``[R, Q]`` float32 (float64 for int64 keys), equal on all ranks; 0 if ``count`` is 0.
    """
    last = (count - 1).clamp(min=0).double()
    at = torch.stack([(last * q).round() for q in fractions]).long().expand(len(keys), -1)
    # One more of the largest keys: with M = 0 there is something to look up.
    largest = keys.new_full((len(keys), 1), torch.iinfo(keys.dtype).max)
    keys = torch.cat((keys, largest), dim=-1).sort(dim=-1).values
    spread = any(collectives.size(group) > 1 for group in groups)
    found = _search(keys, at, groups) if spread else keys.gather(-1, at)
    floats = {integer: real for real, integer in _INTEGERS.items()}
    values = flip_negative(found).view(floats[found.dtype])
    return torch.where(count > 0, values, 0.0)


def _search(keys: Tensor, at: Tensor, groups: Sequence[collectives.Group]) -> Tensor:
    """The keys at positions ``at [R, Q]`` among the sorted keys ``[R, M]`` of all ranks; one
    reduction per byte of a key.
    """
    # The interval that holds the answer is given by its middle: bounds relative to it do not
    # overflow.
    middle = torch.zeros_like(at, dtype=keys.dtype)
    steps = torch.arange(
        -(1 << _RADIX_BITS) // 2, (1 << _RADIX_BITS) // 2, device=keys.device, dtype=keys.dtype
    )
    for shift in range(8 * keys.itemsize - _RADIX_BITS, -1, -_RADIX_BITS):
        lowest = middle[..., None] + (steps << shift)
        highest = lowest + ((1 << shift) - 1)
        below = torch.searchsorted(keys, highest.flatten(1), right=True).view_as(highest)
        # Invalid keys are counted in the last interval only, and the answer is never beyond it.
        interval = (
            (collectives.sum_(below, groups) <= at[..., None])
            .sum(-1, keepdim=True)
            .clamp(max=len(steps) - 1)
        )
        middle = lowest.gather(-1, interval)[..., 0] + ((1 << shift) >> 1)
    return middle
