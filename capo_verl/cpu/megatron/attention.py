# SPDX-License-Identifier: Apache-2.0
"""Exact causal attention for verl's two batch layouts.

It takes the place of Megatron-Core's local core attention.

Megatron-Core's ``DotProductAttention`` without Transformer Engine cannot be used under verl: it
refuses packed batches (``megatron/core/transformer/dot_product_attention.py:153``), and it reads
the padding mask the wrong way round. verl passes ``[batch, sequence]``, True where there is a token
(``verl/models/mcore/util.py``, ``preprocess_bshd_engine``); Megatron-Core means ``[batch, heads,
query, key]``, True where attention is forbidden, and then drops the causal mask
(``megatron/core/fusions/fused_softmax.py:323``). verl pads on the right, so a causal mask alone is
exact.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention


class _GatherRows(torch.autograd.Function):
    """Rows ``[rows, ...]`` of every rank of a group, stacked to ``[ranks, rows, ...]``.

    The gradient is summed back.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(rows) for _ in range(group.size())]
        dist.all_gather(parts, rows.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


def _gather_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return cast(torch.Tensor, _GatherRows.apply(rows, group))  # type: ignore[no-untyped-call]


def _zigzag_positions(length: int, ranks: int) -> torch.Tensor:
    """Positions ``[ranks, length / ranks]`` of a sequence that each context-parallel rank holds.

    A rank holds one chunk from the front of the sequence and its mirror image from the back
    (``verl/models/mcore/util.py``, ``preprocess_thd_engine``), so that all ranks do the same work.
    """
    chunks = torch.arange(length).view(2 * ranks, -1)
    return torch.stack(
        [torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]]) for rank in range(ranks)]
    )


class CausalSdpaAttention(torch.nn.Module):
    """Core attention of a decoder layer, called as Megatron-Core's ``DotProductAttention``."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: Any = None,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout:
            raise ValueError(
                f"attention_dropout={dropout} of the model's config is not supported on the CPU; "
                "set it to 0"
            )
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attention of every query to its own and earlier positions.

        Args:
            query: ``[s, b, n, d]`` padded on the right, or ``[t, n, d]`` packed.
            key, value: the same with the number of key-value heads.
            attention_mask: not read, see the module's docstring.
            packed_seq_params: boundaries of the packed sequences, or None for a padded batch.

        Returns:
            ``[s, b, n * d]`` or ``[t, n * d]``.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported on the CPU")
        ranks = 1 if self.cp_group is None else self.cp_group.size()
        bounds = [0, len(query) * ranks]  # rows padded to the same length are as one sequence
        if packed_seq_params is not None:
            bounds = packed_seq_params.cu_seqlens_q_padded.tolist()
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = self._attend
        if self.cp_group is not None:
            attend = partial(self._attend_across_ranks, self.cp_group)
        outs = []
        for start, stop in pairwise(bounds):
            q, k, v = (x[start // ranks : stop // ranks] for x in (query, key, value))
            outs.append(attend(q, k, v))
        return torch.cat(outs).flatten(-2)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention over ``[s, ..., n, d]``; causal unless a mask (True: may attend) says more."""
        q, k, v = (x.movedim(0, -2) for x in (q, k, v))
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return out.movedim(-2, 0)

    def _attend_across_ranks(
        self, group: dist.ProcessGroup, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """Attention of a context-parallel rank's part of a sequence.

        Keys and values are gathered, queries stay.
        """
        ranks, rank = group.size(), group.rank()
        positions = _zigzag_positions(len(q) * ranks, ranks)
        order = positions.flatten().argsort()
        k, v = (_gather_rows(x, group).flatten(0, 1)[order] for x in (k, v))
        return self._attend(q, k, v, positions[rank][:, None] >= torch.arange(len(k)))
