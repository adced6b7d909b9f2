# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts of Hugging Face in float64."""

from __future__ import annotations

from typing import Any

import torch


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
