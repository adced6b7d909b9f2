# SPDX-License-Identifier: Apache-2.0
"""What the tests of asynchronous trainers run on gloo ranks."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

TRAINERS = 2
WEIGHTS = {
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "b": torch.full((5,), 1 / 3),
    "c": torch.tensor(7.0),
}


def transfer(bucket_size: int) -> list[dict[str, torch.Tensor]] | bool:
    """Two updates from trainers to servers; what a server received, whether a trainer exported."""
    from capo_verl.cpu.rollout.gloo import GlooCheckpointEngine

    rank, received = dist.get_rank(), []
    engine = GlooCheckpointEngine(bucket_size, is_master=rank == 0)
    for factor in (1, 2):
        metadata: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(metadata, engine.prepare())
        trainers, servers = engine.build_topology(
            TRAINERS, dist.get_world_size() - TRAINERS, metadata
        )
        arguments, mine = (trainers, rank) if rank < TRAINERS else (servers, rank - TRAINERS)
        engine.init_process_group(**{name: values[mine] for name, values in arguments.items()})
        weights = iter([(name, factor * tensor) for name, tensor in WEIGHTS.items()])
        if rank < TRAINERS:
            asyncio.run(engine.send_weights(weights))
            assert next(weights, None) is None
        else:
            received.append(asyncio.run(_collect(engine)))
        engine.finalize()
    return rank < TRAINERS or received


async def _collect(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() async for name, tensor in engine.receive_weights()}


def step_and_go_back(make: Any, layout: Any, model_path: str) -> tuple[float, float]:
    """Largest change of a parameter by an optimizer step after the model was saved, and what is
    left of it once the model is restored.
    """
    from verl.experimental.separation.engine_workers import DetachActorWorker

    from capo_verl.cpu.saved_models import patch
    from tests.cpu.megatron.engine_cases import export, train_step

    patch(SimpleNamespace(DetachActorWorker=DetachActorWorker))
    engine = make(layout, model_path)
    worker = object.__new__(DetachActorWorker)
    strategy = getattr(layout, "strategy", "megatron")
    worker.config = SimpleNamespace(actor=SimpleNamespace(strategy=strategy))
    worker.actor, worker._strategy_handlers = SimpleNamespace(engine=engine), None
    before = export(engine)
    worker.save_model_to_cpu(0)
    train_step(engine, 2)
    moved = _distance(before, export(engine))
    worker.restore_model_from_cpu(0)
    return moved, _distance(before, export(engine))


def _distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((other[name] - tensor).abs().max()) for name, tensor in one.items())
