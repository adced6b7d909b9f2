# SPDX-License-Identifier: Apache-2.0
"""What the filter keeps on a rank that holds rows of the LM head, in bytes."""

from __future__ import annotations

from typing import NamedTuple

_SIZES = {"float32": 4, "bfloat16": 2}
_OF_A_ROW = 16
"""Its slot and its count, int64 each."""
_OF_A_TOKEN = 36
"""Action, position, sequence (int64), advantage, temperature (float32), and four flags."""
_OF_AN_ENTRY = 13
"""Id (int64), probability (float32), whether taken."""


class FilterMemory(NamedTuple):
    """Bytes per rank."""

    moments: int
    """Held throughout; moved to the host with the optimizer's state where verl offloads that."""
    row_sums: int
    """Between the first micro-batch and the optimizer step; this is the bound, if every row is touched."""
    batch_shifts: int
    """Likewise, for ``batch_shifts()``, at most ``batch_shift_tokens`` tokens."""


def filter_memory(
    vocab_size: int,
    hidden_size: int,
    tp: int = 1,
    moments_dtype: str = "float32",
    top_k: int = 50,
    batch_shift_tokens: int = 65536,
    hidden_bytes: int = 2,
) -> FilterMemory:
    """Memory of a filter with top-k support and the adam model.

    Args:
        vocab_size: V, rounded up to a multiple of ``tp`` here.
        tp: tensor-parallel size; with FSDP the LM head is not sharded, so 1.
        moments_dtype: ``float32`` or ``bfloat16``.
        hidden_bytes: of one element of the hidden states, 2 for bfloat16.
    """
    rows = -(-vocab_size // tp)
    return FilterMemory(
        moments=2 * rows * hidden_size * _SIZES[moments_dtype],
        row_sums=rows * (hidden_size * 4 + _OF_A_ROW) + 8,
        batch_shifts=batch_shift_tokens * (hidden_size * hidden_bytes + top_k * _OF_AN_ENTRY + _OF_A_TOKEN),
    )
