# SPDX-License-Identifier: Apache-2.0
"""CAPO training steps of the FSDP engine on one rank: what ``test_engine.py`` runs on gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.cpu.engine_cases import export
from tests.cpu.fsdp_cases import MICRO_BATCH_SIZE, FsdpLayout, make_fsdp_engine
from tests.megatron.capo_cases import (
    KNOBS,
    LR,
    STEPS,
    make_batch,
    make_loss,
    moments,
    train_engine,
    train_save_resume_engine,
)


def make(layout: FsdpLayout, model_path: str, **settings: Any) -> Any:
    return make_fsdp_engine(layout, model_path, optimizer="AdamW", lr=LR, **settings)


def train(
    layout: FsdpLayout,
    model_path: str,
    loss_mode: str,
    knobs: dict[str, Any] | None,
    temperature: float = 1.0,
    micro_batch_size: int = MICRO_BATCH_SIZE,
    steps: int = STEPS,
    own_engine: bool = True,
    **settings: Any,
) -> dict[str, Any]:
    if not own_engine:
        use_verls_engine(layout.strategy)
    return train_engine(make(layout, model_path, **settings), loss_mode, knobs, temperature, micro_batch_size, steps)


def use_verls_engine(strategy: str) -> None:
    """Register verl's own engine class with what a CPU needs, in place of ours."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from capo_verl.cpu.fsdp_engine import CpuFsdpMixin

    registry = EngineRegistry._engines["language_model"][strategy]
    registry["cpu"] = type("VerlOnCpu", (CpuFsdpMixin, FSDPEngineWithLMHead), {})
