# SPDX-License-Identifier: Apache-2.0
"""The checkpoint engine "gloo": sends the trainer's weights to rollout servers of their own
processes, on a CPU (``actor_rollout_ref.rollout.checkpoint_engine.backend=gloo``).

The trainer's first rank broadcasts buckets to the servers' workers. What is in a bucket goes
through the store at which they met.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, Iterable
from datetime import timedelta
from typing import Any

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from capo_verl.cpu.rollout.replica import buckets

NAME = "gloo"
_c10d: Any = torch.distributed
"""Its stubs lack the classes of stores and groups."""
TIMEOUT = timedelta(minutes=10)


@CheckpointEngineRegistry.register(NAME)
class GlooCheckpointEngine(CheckpointEngine):
    """A group of the trainer's first rank and all workers of the servers, made for each update.

    Args:
        bucket_size: bytes of a bucket.
        is_master: True on the trainer's first rank.
    """

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.bucket_size, self.is_master = bucket_size, is_master
        self._store: Any = None
        self._group: Any = None

    def prepare(self) -> tuple[str, int] | None:
        """Open the store.

        Returns:
            Its address; None on other ranks.
        """
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        self._store = _c10d.TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT
        )
        return host, self._store.port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Rank, size and address of the store for every process; rank -1 stays outside."""
        size = 1 + rollout_world_size

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {
                "rank": ranks,
                "world_size": [size] * len(ranks),
                "address": [metadata[0]] * len(ranks),
            }

        actors = [0] + [-1] * (actor_wg_world_size - 1)
        return arguments(actors), arguments(list(range(1, size)))

    def init_process_group(self, rank: int, world_size: int, address: tuple[str, int]) -> None:
        if rank < 0:
            return
        if self._store is None:
            self._store = _c10d.TCPStore(*address, is_master=False, timeout=TIMEOUT)
        self._group = _c10d.ProcessGroupGloo(
            _c10d.PrefixStore("group", self._store), rank, world_size, TIMEOUT
        )

    def finalize(self) -> None:
        self._group = self._store = None

    @torch.no_grad()
    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> None:
        """Send all weights, as float32. Every rank drains them, because exporting is collective."""
        if self._group is None:
            for _ in weights:
                pass
            return
        number = 1
        async for bucket in buckets(weights, self.bucket_size):
            held = [(name, list(tensor.shape)) for name, tensor in bucket.items()]
            self._store.set(f"bucket {number}", json.dumps(held))
            self._broadcast(torch.cat([tensor.flatten() for tensor in bucket.values()]))
            number += 1
        self._store.set(f"bucket {number}", "[]")

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Name and tensor (float32) of all weights."""
        number = 1
        while held := json.loads(self._store.get(f"bucket {number}")):
            sizes = [math.prod(shape) for _, shape in held]
            received = self._broadcast(torch.empty(sum(sizes))).split(sizes)
            for (name, shape), tensor in zip(held, received, strict=True):
                yield name, tensor.view(shape)
            number += 1

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        self._group.broadcast(tensor, 0).wait()
        return tensor
