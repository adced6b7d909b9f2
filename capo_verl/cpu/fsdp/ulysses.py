# SPDX-License-Identifier: Apache-2.0
"""verl's Ulysses sequence parallelism without flash attention.

verl builds Ulysses into transformers' flash attention: all-to-all, attention over whole sequences
with a share of the heads, all-to-all back (``_ulysses_flash_attention_forward`` in
``verl/models/transformers/monkey_patch.py``). Here the same code runs with SDPA in the middle, one
packed sequence at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask
from verl.models.transformers import monkey_patch
from verl.utils import ulysses

ATTENTION = "capo_verl_packed"
"""Name of the ``attn_implementation`` that takes the way of flash attention.

Another name, because transformers looks for the package.
"""


def install() -> None:
    """Make ``attn_implementation=ATTENTION`` available, and verl's Ulysses run over gloo."""
    AttentionInterface.register(ATTENTION, flash_attention_forward)
    AttentionMaskInterface.register(ATTENTION, flash_attention_mask)
    monkey_patch._flash_attention_forward = packed_attention
    ulysses.all_to_all_tensor = all_to_all_tensor


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    query_length: int,
    *,
    position_ids: torch.Tensor,
    softmax_scale: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Stand-in for ``_flash_attention_forward`` of transformers, for packed sequences; causal.

    Args:
        query: ``[1, t, n, d]``; key, value: the same with the number of key-value heads.
        position_ids: ``[1, t]``, 0 where a sequence begins.
    """
    if sliding_window is not None or softcap is not None or dropout:
        raise ValueError(
            "sliding windows, soft capping and dropout of attention are not supported with Ulysses "
            "on the CPU: set actor_rollout_ref.actor.ulysses_sequence_parallel_size=1"
        )
    bounds = (position_ids[0] == 0).nonzero().flatten().tolist()
    lengths = torch.tensor([*bounds, position_ids.shape[1]]).diff().tolist()
    # Sequences [1, n, length, d] of each.
    q, k, v = (x.transpose(1, 2).split(lengths, dim=2) for x in (query, key, value))
    outs = [
        scaled_dot_product_attention(
            *sequence, is_causal=True, scale=softmax_scale, enable_gqa=True
        )
        for sequence in zip(q, k, v, strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2)


def all_to_all_tensor(
    local_input: torch.Tensor,
    scatter_dim: int,
    gather_dim: int,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> torch.Tensor:
    """verl's function of that name with the one all-to-all that gloo has. Never asynchronous."""
    group = ulysses.get_ulysses_sequence_parallel_group() if group is None else group
    parts = torch.stack(local_input.tensor_split(group.size(), scatter_dim))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(), dim=gather_dim)
