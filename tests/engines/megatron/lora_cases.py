# SPDX-License-Identifier: Apache-2.0
"""LoRA under Megatron on one rank: what ``test_lora.py`` runs on gloo ranks."""

from __future__ import annotations

from typing import Any

import torch

from tests.cpu.megatron.engine_cases import Layout, export, make_engine
from tests.engines.megatron.capo_cases import KNOBS, LR, make_batch, make_loss, moments
from tests.engines.megatron.replay_cases import COLUMNS, evaluations
from tests.engines.megatron.state_cases import step

STEPS = 3


def make(layout: Layout, model_path: str, merge: bool = True) -> Any:
    lora = {
        "rank": 4, "alpha": 8, "merge": merge,
        "target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
    }  # fmt: skip
    return make_engine(
        layout, model_path, optimizer="adam", lr=LR, lora=lora, bridge="megatron-bridge"
    )


def train(layout: Layout, model_path: str) -> list[dict[str, Any]]:
    """Of each step the merged weights before it, and what went into the filter and came out, one
    row per response token of this rank.
    """
    engine, steps = make(layout, model_path), []
    loss = make_loss("capo", KNOBS)
    for _ in range(STEPS):
        weights = export(engine)
        with engine.train_mode(), evaluations(fused=False) as seen:
            engine.train_batch(make_batch(engine, 1.0), loss)
        columns = {name: torch.cat([row[name] for row in seen]) for name in COLUMNS if seen}
        steps.append({"weights": weights, **columns})
    return steps


def interrupted(layout: Layout, model_path: str, checkpoint: str, merge: bool) -> list[Any]:
    """The third step: of the run that saved after two, and of a fresh engine that loaded."""
    found = []
    for resumed in (False, True):
        engine = make(layout, model_path, merge)
        if resumed:
            engine.load_checkpoint(checkpoint, del_local_after_load=False)
        else:
            for _ in range(2):
                step(engine)
            engine.save_checkpoint(checkpoint, global_step=2)
        metrics = step(engine)
        trained = {
            name: p.detach().clone()
            for chunk in engine.module
            for name, p in chunk.named_parameters()
            if p.requires_grad
        }
        found.append((metrics, trained, moments(engine)))
    return found
