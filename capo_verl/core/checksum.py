# SPDX-License-Identifier: Apache-2.0
"""A checksum of row-sharded tensors that does not depend on how they are sharded."""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.chunks import chunk_slices, scratch_elements

_ODD = 0x1E3779B97F4A7C15


def checksum(x: Tensor, first_row: int, tp_group: collectives.Group) -> Tensor:
    """Sum of the bits of every element times an odd weight of its place, modulo 2^64. Collective
    over ``tp_group``.

    Rows of zeros, such as the padding of a vocabulary, do not count.

    Args:
        x: ``[rows, H]`` of a floating dtype, this rank's rows. float16, bfloat16 and float32 of the
            same values have the same checksum.
        first_row: global id of the first one.

    Returns:
        Scalar int64.
    """
    total = torch.zeros((), device=x.device, dtype=torch.int64)
    bits = torch.int64 if x.dtype == torch.float64 else torch.int32
    columns = torch.arange(x.shape[1], device=x.device)
    for part in chunk_slices(len(x), max(1, scratch_elements(x.device) // x.shape[1])):
        rows = torch.arange(first_row + part.start, first_row + part.stop, device=x.device)
        weight = (rows[:, None] * x.shape[1] + columns) * (2 * _ODD) + 1
        values = x[part] if x.dtype == torch.float64 else x[part].float()
        total += (values.contiguous().view(bits).long() * weight).sum()
    return collectives.sum_(total, (tp_group,))
