# SPDX-License-Identifier: Apache-2.0
"""Every collective CAPO uses. The only file of the core that calls ``torch.distributed``.

A group is a ``torch.distributed.ProcessGroup`` or None, which means one process; then nothing is
communicated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def sum_(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """Sum ``x`` in place over the given groups, one after the other; returns it."""
    return _reduce(x, groups, dist.ReduceOp.SUM)


def max_(x: Tensor, groups: Sequence[Group]) -> Tensor:
    """Element-wise maximum of ``x`` in place over the given groups; returns it."""
    return _reduce(x, groups, dist.ReduceOp.MAX)


def gather(x: Tensor, group: Group) -> Tensor:
    """Concatenate ``x [..., n]`` of all ranks, in rank order, along the last dimension: ``[..., n *
    size]``.
    """
    if size(group) == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _reduce(x: Tensor, groups: Sequence[Group], op: dist.ReduceOp.RedOpType) -> Tensor:
    for group in groups:
        if size(group) > 1:
            dist.all_reduce(x, op=op, group=group)
    return x
