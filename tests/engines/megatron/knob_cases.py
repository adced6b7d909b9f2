# SPDX-License-Identifier: Apache-2.0
"""Training steps of which only some are measured, on one rank, of any engine."""

from __future__ import annotations

from typing import Any

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout, export
from tests.engines.megatron.capo_cases import make_batch, make_loss, moments
from tests.engines.megatron.state_cases import new_engine


def training_step(
    engine: Any, knobs: dict[str, Any] | None, loss_mode: str, mini_batches: int
) -> list[dict[str, Any]]:
    """As verl's worker does it: optimizer steps, then one step of the schedule.

    CAPO's metrics of each optimizer step.
    """
    reports = []
    with engine.train_mode():
        for _ in range(mini_batches):
            output = engine.train_batch(make_batch(engine, 1.0), make_loss(loss_mode, knobs))
            reports.append({k: v for k, v in output["metrics"].items() if k.startswith("capo/")})
        engine.lr_scheduler_step()
    return reports


def run(
    layout: Layout | FsdpLayout,
    model: str,
    knobs: dict[str, Any] | None,
    steps: int,
    loss_mode: str = "capo",
    mini_batches: int = 1,
    save_after: tuple[int, str] | None = None,
    load: str | None = None,
) -> dict[str, Any]:
    """``steps`` training steps; ``save_after``: a step and where to save then; ``load``: a
    checkpoint to start from.
    """
    engine = new_engine(layout, model)
    if load is not None:
        engine.load_checkpoint(load, del_local_after_load=False)
    reports = []
    for at in range(steps):
        reports += training_step(engine, knobs, loss_mode, mini_batches)
        if save_after is not None and at + 1 == save_after[0]:
            engine.save_checkpoint(save_after[1], global_step=at + 1)
    return {"reports": reports, "weights": export(engine), "moments": moments(engine)}


def all_of(
    layout: Layout | FsdpLayout, model: str, runs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Several runs in one process."""
    return [run(layout, model, **arguments) for arguments in runs]
