# SPDX-License-Identifier: Apache-2.0
"""verl's two handles on a server of the rollout backend "hf".

One starts it, the other sends it the weights.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from typing import Any

import ray
import torch
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica
from verl.workers.rollout.utils import ensure_async_iterator

from capo_verl.cpu.rollout import NAME
from capo_verl.cpu.rollout.server import HFServer, check_rollout_config

Weights = Iterable[tuple[str, torch.Tensor]] | AsyncIterable[tuple[str, torch.Tensor]]


class HFReplica(RolloutReplica):
    """One server actor next to the first of the trainer ranks that it belongs to."""

    def rollout_worker_use_gpu(self) -> bool:
        return False

    async def launch_servers(self) -> None:
        check_rollout_config(self.config)
        node_id = await self.workers[0].__ray_call__.remote(
            lambda worker: ray.get_runtime_context().get_node_id()
        )
        affinity = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            node_id=node_id, soft=False
        )
        server = (
            ray.remote(HFServer)
            .options(
                num_cpus=0,
                name=f"{server_name(self.replica_rank)}{self.name_suffix}",
                max_concurrency=self.max_concurrency,
                scheduling_strategy=affinity,
            )
            .remote(self.config, self.model_config, self.replica_rank)
        )
        host, port = await server.get_server_address.remote()
        self.servers = [server]
        self._server_handle = server
        self._server_address = (
            f"{host}:{port}"  # nothing listens there; verl's load balancer takes it as a name
        )


def server_name(replica_rank: int) -> str:
    return f"{NAME}_server_{replica_rank}"


async def buckets(weights: Weights, limit_bytes: int) -> AsyncIterator[dict[str, torch.Tensor]]:
    """Group weights into dictionaries of about `limit_bytes`.

    They are float32: a server on a CPU has no other type.

    They are copies: a view of a buffer, as the distributed optimizer makes them, would be pickled
    with all of its buffer.
    """
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    async for name, tensor in ensure_async_iterator(weights):
        bucket[name] = tensor.detach().to("cpu", torch.float32, copy=True)
        size += bucket[name].nbytes
        if size >= limit_bytes:
            yield bucket
            bucket, size = {}, 0
    if bucket:
        yield bucket


class HFServerAdapter(BaseRollout):
    """Sender of weights in a trainer rank.

    The first rank of a replica sends them to the replica's server.
    """

    def __init__(
        self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1
    ) -> None:
        super().__init__(config, model_config, device_mesh)
        ranks = (
            self.config.tensor_model_parallel_size
            * self.config.data_parallel_size
            * self.config.pipeline_model_parallel_size
        )
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // ranks if replica_rank == -1 else replica_rank
        self.is_leader = rank % ranks == 0
        self.server: Any = None

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self,
        weights: Weights,
        global_steps: int | None = None,
        wire_format: str = "named_tensors",
        **kwargs: Any,
    ) -> None:
        """Send all weights.

        Every rank drains the generator, because exporting is collective; the leader raises last.

        Raises:
            ValueError: for weights that are missing, unknown, or of another shape.
        """
        if wire_format != "named_tensors":
            raise ValueError(
                f"the rollout backend '{NAME}' takes full weights, not {wire_format!r}"
            )
        limit = self.config.checkpoint_engine.update_weights_bucket_megabytes << 20
        if not self.is_leader:
            async for _ in ensure_async_iterator(weights):
                pass
            return
        if self.server is None:  # started after the trainer ranks
            self.server = ray.get_actor(server_name(self.replica_rank))
        sent = [self.server.load_weights.remote(bucket) async for bucket in buckets(weights, limit)]
        await asyncio.gather(*sent)
        await self.server.finish_weights.remote(global_steps)
