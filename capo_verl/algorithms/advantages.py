# SPDX-License-Identifier: Apache-2.0
"""Advantage estimators which verl lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est


@register_adv_est("reinforce")
@torch.no_grad()
def compute_reinforce_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """REINFORCE without baseline: every response token's advantage is its sequence's reward (ReinCAPO).

    Args:
        token_level_rewards: ``[B, T]``.
        response_mask: ``[B, T]``.

    Returns:
        Advantages and returns, both ``[B, T]``.
    """
    returns = token_level_rewards.sum(dim=-1, keepdim=True) * response_mask
    return returns, returns
