# SPDX-License-Identifier: Apache-2.0
"""The real model in verl's engine on one rank: what ``test_pretrained.py`` runs on two."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.cpu.megatron.engine_cases import Layout, export, make_batch, make_engine, nll


@dataclass
class Measured:
    """What one rank saw; differences are largest absolute values."""

    log_probs: list[torch.Tensor]
    """One tensor per sequence."""
    differs_from_file: float
    """Weights in the engine against those in the folder."""
    moved: float
    """By training, in the weight tensor that moved least."""
    added_heads: float
    """Weights of the added heads after training."""


def measure(
    model_path: str, rows: list[torch.Tensor], heads: int, kv_heads: int, head_dim: int
) -> Measured:
    """Log-probs, then two steps of Adam on the same rows.

    Args:
        rows: token ids of the sequences.
        heads, kv_heads, head_dim: of the original model; all behind them were added.
    """
    from safetensors.torch import load_file

    engine = make_engine(Layout(tp=2), model_path, optimizer="adam", lr=1e-4)
    with engine.eval_mode(), torch.no_grad():
        output = engine.forward_backward_batch(
            make_batch(engine, rows=rows), None, forward_only=True
        )
    log_probs = [row.clone() for row in output["model_output"]["log_probs"].unbind()]
    before = export(engine)
    saved = load_file(f"{model_path}/model.safetensors")
    differs = max((before[name] - tensor).abs().max().item() for name, tensor in saved.items())
    with engine.train_mode():
        for _ in range(2):
            engine.forward_backward_batch(make_batch(engine, rows=rows), nll)
            engine.optimizer_step()
    after = export(engine)
    moved = min((after[name] - before[name]).abs().max().item() for name in before)
    added = 0.0
    for name, tensor in after.items():
        if "o_proj" in name:
            added = max(added, tensor[:, heads * head_dim :].abs().max().item())
        elif any(projection in name for projection in ("q_proj", "k_proj", "v_proj")):
            real = heads if "q_proj" in name else kv_heads
            added = max(added, tensor[real * head_dim :].abs().max().item())
    return Measured(log_probs, differs, moved, added)
