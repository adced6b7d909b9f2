# SPDX-License-Identifier: Apache-2.0
"""Bytes that the filter keeps on a rank that holds rows of the LM head."""

from __future__ import annotations

from typing import NamedTuple

_SIZES = {"float32": 4, "bfloat16": 2}
_OF_A_ROW = 8
"""Its count, int64."""
_OF_A_TOKEN = 36
"""Action, position, sequence (int64), advantage, temperature (float32), and four flags."""
_OF_AN_ENTRY = 13
"""Id (int64), probability (float32), whether taken."""


class FilterMemory(NamedTuple):
    """Bytes per rank."""

    moments: int
    """Held throughout; moved to the host with the optimizer's state where verl offloads that."""
    tokens: int
    """Between the first micro-batch and the optimizer step: hidden states and supports of the
    tokens seen, up to the limit at which they are folded into row sums, or ``batch_shift_tokens``
    if that is more.
    """
    row_sums: int
    """Likewise; the rows' sums only if there are more tokens than the limit, their counts always.
    """


def fold_limit(rows: int, hidden_size: int) -> int:
    """Bytes of hidden states beyond which they are folded into float32 sums of all ``rows``: half
    of what those take.
    """
    return rows * hidden_size * 4 // 2


def filter_memory(
    vocab_size: int,
    hidden_size: int,
    tokens: int,
    tp: int = 1,
    moments_dtype: str = "float32",
    top_k: int = 50,
    batch_shift_tokens: int = 65536,
    hidden_bytes: int = 2,
) -> FilterMemory:
    """Memory of a filter with top-k support and the adam model.

    Args:
        vocab_size: V, rounded up to a multiple of ``tp`` here.
        tokens: response tokens of this rank per optimizer step.
        tp: tensor-parallel size; with FSDP the LM head is not sharded, so 1.
        moments_dtype: ``float32`` or ``bfloat16``.
        hidden_bytes: of one element of the hidden states, 2 for bfloat16.
    """
    rows = -(-vocab_size // tp)
    limit = fold_limit(rows, hidden_size) // (hidden_size * hidden_bytes)
    kept = min(tokens, max(limit, batch_shift_tokens))
    return FilterMemory(
        moments=2 * rows * hidden_size * _SIZES[moments_dtype],
        tokens=kept * (hidden_size * hidden_bytes + top_k * _OF_AN_ENTRY + _OF_A_TOKEN),
        row_sums=(rows + 1) * _OF_A_ROW + (rows * hidden_size * 4 if tokens > limit else 0),
    )
