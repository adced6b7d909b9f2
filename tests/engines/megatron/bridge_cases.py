# SPDX-License-Identifier: Apache-2.0
"""Both bridges on one rank, one after the other: the same steps, and a checkpoint that goes from
one to the other.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tests.cpu.megatron.engine_cases import Layout, export, make_engine
from tests.engines.megatron.capo_cases import LR, moments
from tests.engines.megatron.replay_cases import Case, Replay, replay
from tests.engines.megatron.state_cases import step
from tests.helpers.bridge import BRIDGES
from tests.helpers.recording import LEARNING_RATES, RecordedBatch

RATES = (*LEARNING_RATES, LEARNING_RATES[-1])


@dataclass(frozen=True)
class BridgeCase:
    """A layout, a model in it, the dtype of its weights."""

    layout: Layout
    model: str = "untied"
    dtype: str = "float32"
    fused: bool = False

    def __str__(self) -> str:
        return f"{self.layout}, {self.model}, {self.dtype}{', fused' if self.fused else ''}"


def steps_of_both(case: BridgeCase, batch: RecordedBatch, model_path: str) -> list[Replay]:
    """Three CAPO steps through each bridge."""
    replayed = Case(case.layout, fused=case.fused)
    results = []
    for bridge in BRIDGES:
        begin(case.dtype)
        results.append(replay(replayed, batch, model_path, RATES, bridge))
    return results


def begin(dtype: str) -> None:
    """Make way for an engine of another bridge, with weights of this dtype."""
    from megatron.core import parallel_state

    from capo_verl.cpu.megatron import engine

    engine.ENGINE_CONFIG["dtype"] = dtype
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)  # Megatron-Core compares them with the attention backend


def resume_through_both(case: BridgeCase, model_path: str, folder: str) -> dict[str, list[Any]]:
    """Two steps and a checkpoint through each bridge; the third step through each from each.

    Returns:
        By the bridge that saved: moments and weights after the third step, without interruption and
        resumed through each bridge.
    """

    def new(bridge: str) -> Any:
        begin(case.dtype)
        return make_engine(case.layout, model_path, optimizer="adam", lr=LR, bridge=bridge)

    def go_on(engine: Any) -> tuple[Any, Any]:
        step(engine)
        return moments(engine), export(engine)

    results = {}
    for saving in BRIDGES:
        engine, checkpoint = new(saving), os.path.join(folder, saving)
        for _ in range(2):
            step(engine)
        engine.save_checkpoint(checkpoint, global_step=2)
        results[saving] = [go_on(engine)]
        for loading in BRIDGES:
            engine = new(loading)
            engine.load_checkpoint(checkpoint, del_local_after_load=False)
            results[saving].append(go_on(engine))
    return results
