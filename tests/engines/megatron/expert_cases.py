# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts under a KL budget on one rank: what ``test_experts.py`` runs on gloo
ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.cpu.megatron.engine_cases import export
from tests.engines.megatron.kl_cases import batch_of, make, step
from tests.engines.megatron.replay_cases import Case

BALANCED: dict[str, Any] = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [1e-2] * 3,
    "moe_z_loss_coeff": 1e-3,
}


def counted(
    case: Case, model_path: str, knobs: dict[str, Any], at: list[float] | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Three steps of a model whose routers count: the learning rates of the steps, and what the
    routers know afterwards, with the weights.

    Args:
        at: learning rates, in place of the engine's.
    """
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
    from megatron.core.transformer.moe.router import TopKRouter

    engine = make(case, model_path, override_transformer_config=BALANCED)
    routers = [m for chunk in engine.module for m in chunk.modules() if isinstance(m, TopKRouter)]
    for router in routers:  # Qwen3-MoE has no bias per expert, of which this is a part
        router.enable_expert_bias = True
        router.local_tokens_per_expert = torch.zeros(4)
    rates = []
    for i in range(3):
        for group in engine.optimizer.param_groups if at else ():
            group["lr"] = at[i]
        rates += step(engine, batch_of(engine, case), knobs).get("capo/lr", [])
    known = export(engine)
    for name, entry in get_moe_layer_wise_logging_tracker().items():
        known[f"{name} of the log"] = entry["values"].clone()
    for i, router in enumerate(routers):
        for name in ("global_tokens_per_expert", "ga_steps", "local_tokens_per_expert"):
            known[f"{name} of layer {i}"] = getattr(router, name).clone()
    return rates, known


def refused(case: Case, model_path: str, knobs: dict[str, Any], config: dict[str, Any]) -> str:
    """What the first step of a run says whose router is told to draw random numbers."""
    engine = make(case, model_path, override_transformer_config=config)
    try:
        step(engine, batch_of(engine, case), knobs)
    except ValueError as refusal:
        return str(refusal)
    return ""


def passes_before(case: Case, model_path: str, config: dict[str, Any]) -> bool:
    """True if the KL probe looks at the policy before a step in a pass of its own."""
    return bool(make(case, model_path, override_transformer_config=config)._has_dropout())
