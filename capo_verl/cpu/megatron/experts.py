# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts on a CPU: Megatron-Core's dispatcher, and mbridge's names of their weights.

Each expert is a module of its own here (``SequentialMLP``). On a GPU Transformer Engine multiplies
them as a group, which is what mbridge knows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import token_dispatcher

from capo_verl.plugin import compat


def install() -> None:
    """Let Megatron-Core's router and dispatcher work without CUDA and Transformer Engine."""
    compat.shim_router()
    token_dispatcher.maybe_move_tensor_to_cpu = _as_numpy
    for name, uneven in (
        ("_gather_along_first_dim", _gather_uneven),
        ("_reduce_scatter_along_first_dim", _reduce_scatter_uneven),
    ):
        if not hasattr(even := getattr(mappings, name), "capo_verl"):
            setattr(mappings, name, _for_uneven(even, uneven))


def _for_uneven(even: Any, uneven: Any) -> Callable[..., torch.Tensor]:
    """Megatron-Core's collective, and ``uneven`` for parts of different sizes: gloo has none.

    The ranks that share an expert hold different numbers of its tokens.
    """

    def either(
        tensor: torch.Tensor,
        group: dist.ProcessGroup,
        sizes: Sequence[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even(tensor, group, sizes, *args, **kwargs)
        return uneven(tensor, group, sizes)

    either.capo_verl = True  # type: ignore[attr-defined]
    return either


def _gather_uneven(
    part: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int]
) -> torch.Tensor:
    whole = part.new_zeros(sum(sizes), *part.shape[1:])
    whole.split(sizes)[group.rank()].copy_(part)
    dist.all_reduce(whole, group=group)
    return whole


def _reduce_scatter_uneven(
    whole: torch.Tensor, group: dist.ProcessGroup, sizes: Sequence[int]
) -> torch.Tensor:
    whole = whole.clone()
    dist.all_reduce(whole, group=group)
    return whole.split(sizes)[group.rank()].clone()


def _as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """How many tokens go where, as numbers if ``torch.distributed`` is to read them.

    Megatron-Core turns tensors into numbers while it fetches them from a GPU
    (``megatron/core/transformer/moe/moe_utils.py:1093``).
    """
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def grouped_name(name: str) -> str:
    """The name of an expert's weight in a grouped multiplication, ``experts.linear_fc1.weight3``.

    Other names stay.
    """
    return re.sub(r"\.experts\.local_experts\.(\d+)\.(.+\.weight)$", r".experts.\2\1", name)


class GroupedNames:
    """Keys of a model that mbridge reads, under the names that it has for experts."""

    def __init__(self, model: torch.nn.Module):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {grouped_name(name): x for name, x in self._model.state_dict().items()}

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((grouped_name(name), x) for name, x in self._model.named_parameters())
