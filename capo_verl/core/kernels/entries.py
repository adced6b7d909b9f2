# SPDX-License-Identifier: Apache-2.0
"""The entries of accepted tokens, sorted by vocabulary row: the sparse half of every gradient of
the LM head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RowEntries(NamedTuple):
    """``G_j = sum_p weight_p * hidden[token_p]`` over the entries p of row j."""

    token: Tensor
    """``[P]`` int64, by row, and in a row in the order of the tokens: a fixed order of summation on
    every device.
    """
    weight: Tensor
    """``[P]``, A v of the entry, in the compute dtype."""
    offsets: Tensor
    """``[rows + 1]`` int64, row j's entries are ``offsets[j] .. offsets[j + 1]``; those after the
    last count for nothing.
    """

    @property
    def counts(self) -> Tensor:
        """``[rows]`` int64, entries of each row."""
        return self.offsets.diff()


def sort_by_row(row: Tensor, weight: Tensor, include: Tensor, rows: int) -> RowEntries:
    """Entries ``row [N, k]`` int64 with ``weight [N, k]`` of the tokens in ``include [N]``; rows
    not in ``0..rows`` are not held here. Shapes do not depend on the values, so the device need not
    be waited for.
    """
    held = (row >= 0) & (row < rows) & include[:, None]
    row = torch.where(held, row, rows).int().flatten()
    row, order = row.sort(stable=True)
    every_row = torch.arange(rows + 1, device=row.device, dtype=torch.int32)
    token = order // weight.shape[1]
    return RowEntries(token, weight.flatten()[order], torch.searchsorted(row, every_row))
