# SPDX-License-Identifier: Apache-2.0
"""Groups of a tensor-, context- and data-parallel layout on the ranks of a gloo group."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist


class Place(NamedTuple):
    """Where a rank is in its layout."""

    tp: int
    cp: int
    dp: int


def make_groups(tp: int, dp: int, cp: int) -> tuple[Place, dict[str, dist.ProcessGroup]]:
    """This rank's place, and its groups of more than one rank as ``CapoFilter`` takes them.

    Collective; also without ranks.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    sizes, strides = {"tp": tp, "cp": cp, "dp": dp}, {"tp": 1, "cp": tp, "dp": tp * cp}
    groups = {}
    for name, size in sizes.items():
        for first in range(tp * cp * dp):
            if first // strides[name] % size == 0 and size > 1:
                ranks = [first + i * strides[name] for i in range(size)]
                group = dist.new_group(ranks)
                if rank in ranks:
                    groups[f"{name}_group"] = group
    return Place(rank % tp, rank // tp % cp, rank // (tp * cp)), groups
