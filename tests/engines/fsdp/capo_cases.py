# SPDX-License-Identifier: Apache-2.0
"""CAPO training steps of the FSDP engine on one rank: what ``test_engine.py`` runs on gloo
ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.cpu.fsdp.engine_cases import MICRO_BATCH_SIZE, FsdpLayout, make_fsdp_engine
from tests.engines.megatron.capo_cases import KNOBS, LR, STEPS, make_batch, make_loss, train_engine


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
    return train_engine(
        make(layout, model_path, **settings), loss_mode, knobs, temperature, micro_batch_size, steps
    )


def use_verls_engine(strategy: str) -> None:
    """Register verl's own engine class with what a CPU needs, in place of ours."""
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    from capo_verl.cpu.fsdp.engine import CpuFsdpMixin

    registry = EngineRegistry._engines["language_model"][strategy]
    registry["cpu"] = type("VerlOnCpu", (CpuFsdpMixin, FSDPEngineWithLMHead), {})


def filter_under_autocast(
    layout: FsdpLayout, model_path: str
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """m_F of a micro-batch whose forward pass ran under bfloat16 autocast; the same in float64; the
    dtype of its logits.
    """
    engine, seen = make(layout, model_path), {}
    knobs = {**KNOBS, "optimizer_model": "sgd"}
    train_once(engine, knobs)
    engine._autocast_dtype = torch.bfloat16
    evaluate = engine._step.capo.evaluate

    def spy(hidden_states: torch.Tensor, logits: Any, *args: Any, **kwargs: Any) -> Any:
        out = evaluate(hidden_states, logits, *args, **kwargs)
        if not seen:
            with torch.autocast("cpu", enabled=False):
                whole = hidden_states.to(logits.dtype) @ logits.weight.T if layout.fused else logits
                exact = evaluate(hidden_states.double(), whole.double(), *args, **kwargs)
            seen.update(found=out.policy_shift, expected=exact.policy_shift, dtype=logits.dtype)
        return out

    engine._step.capo.evaluate = spy
    train_once(engine, knobs)
    return seen["found"], seen["expected"], seen["dtype"]


def train_once(engine: Any, knobs: dict[str, Any]) -> dict[str, Any]:
    with engine.train_mode():
        return engine.train_batch(
            make_batch(engine, 1.0, MICRO_BATCH_SIZE), make_loss("capo", knobs)
        )


def without_parameter_groups(layout: FsdpLayout, model_path: str) -> tuple[str, bool]:
    """What this rank is told if the last one's optimizer has no parameter groups, and if it is a
    run with CAPO now.
    """
    engine = make(layout, model_path)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        engine.optimizer.param_groups = []
    try:
        train_once(engine, KNOBS)
    except ValueError as refusal:
        return str(refusal), engine._step is not None
    return "", engine._step is not None
