# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of hidden states per vocabulary row: the sparse half of every gradient of the LM head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from capo_verl.core.chunks import chunk_slices, scratch_elements


def segment_sums(hidden: Tensor, token: Tensor, segment: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """``sum_p weight_p * hidden[token_p]`` for every segment, without a row per entry and in a fixed order of summation.

    Args:
        hidden: ``[N, H]`` in the compute dtype.
        token, segment: ``[P]`` int64; weight: ``[P]`` in the compute dtype.

    Yields:
        ``(segments [s], sums [s, H])``, each segment once, in ascending order.
    """
    if not len(token):
        return
    order = segment.argsort(stable=True)  # stable: entries of a segment are added in token order on every device
    token, weight = token[order], weight[order]
    segments, lengths = segment[order].unique_consecutive(return_counts=True)
    ends = lengths.cumsum(0)
    for part in chunk_slices(len(segments), max(1, scratch_elements(hidden.device) // hidden.shape[1])):
        first, last = ends[part.start] - lengths[part.start], ends[part.stop - 1]
        offsets = ends[part] - lengths[part] - first
        sums = torch.nn.functional.embedding_bag(
            token[first:last], hidden, offsets, mode="sum", per_sample_weights=weight[first:last]
        )
        yield segments[part], sums
