# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts of Hugging Face in float64, and its weights under the names of a checkpoint:
transformers 5 keeps those of all experts of a layer in one tensor.
"""

from __future__ import annotations

from typing import Any

import torch


def one_by_one(tensors: dict[str, Any]) -> dict[str, Any]:
    """Weights or gradients, one tensor per expert's matrix; others stay."""
    found: dict[str, Any] = {}
    for name, x in tensors.items():
        layer, _, which = name.rpartition(".experts.")
        if which not in ("gate_up_proj", "down_proj"):
            found[name] = x
            continue
        for expert, of_expert in enumerate(x):
            parts = {"down_proj": of_expert}
            if which == "gate_up_proj":
                half = len(of_expert) // 2
                parts = {"gate_proj": of_expert[:half], "up_proj": of_expert[half:]}
            for part, matrix in parts.items():
                found[f"{layer}.experts.{expert}.{part}.weight"] = matrix
    return found


def in_float64(router: Any, passes: int | None = None) -> Any:
    """The forward pass of a router of Qwen3-MoE, without its own float32.

    Args:
        passes: after so many, tokens go where they went before.
    """
    routes: list[torch.Tensor] = []

    def forward(hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert router.norm_topk_prob
        logits = hidden_states.reshape(-1, router.hidden_dim) @ router.weight.T
        experts = logits.topk(router.top_k).indices
        if passes is not None:
            if len(routes) == passes:
                experts = routes.pop(0)
            routes.append(experts)
        return logits, logits.gather(-1, experts).softmax(-1), experts

    return forward
