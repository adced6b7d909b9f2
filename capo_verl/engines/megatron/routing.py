# SPDX-License-Identifier: Apache-2.0
"""Comparability of routes: whether two forward passes of a mixture of experts can be compared.

The KL probe looks at a policy before and after a step. What a router does with a token depends on
the weights, which is part of the policy, so that the passes may send it to different experts; but
it must not depend on anything else.
"""

from __future__ import annotations

from typing import Any


def differs_in_training(config: Any) -> bool:
    """True if training routes the same tokens by other rules than evaluation mode does, or by the
    other tokens of the micro-batch, of which the probe may leave some out.

    Args:
        config: Megatron's ``TransformerConfig``.
    """
    balancing = config.moe_router_load_balancing_type
    kinds = [balancing] if isinstance(balancing, str) else balancing
    return config.num_moe_experts is not None and (
        "sinkhorn" in kinds or config.moe_expert_capacity_factor is not None
    )


def check_repeatable(config: Any) -> None:
    """
    Raises:
        ValueError: if the routers draw random numbers in evaluation mode as well
            (``megatron/core/transformer/moe/router.py``, ``TopKRouter.forward``).
    """
    if config.num_moe_experts is None:
        return
    override = "actor_rollout_ref.actor.megatron.override_transformer_config"
    for key in ("moe_input_jitter_eps", "moe_router_force_load_balancing"):
        value = getattr(config, key)
        if value:
            raise ValueError(
                "capo.kl_budget cannot compare two passes whose routers draw random numbers: drop "
                f"{override}.{key}={value}, or set kl_budget=null"
            )
