# SPDX-License-Identifier: Apache-2.0
"""The paper's policy objective and advantages, registered with verl at import."""

from __future__ import annotations

from typing import Any

import torch
import verl.utils.torch_functional as verl_F
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss

_MAX_LOG_RATIO = 20.0  # as verl's own losses: exp() of more is no useful weight


@register_policy_loss("capo")  # type: ignore[untyped-decorator]  # verl has no types
def compute_policy_loss_capo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Policy loss ``-A * pi/pi_old`` per token, without clipping (arXiv 2510.00819, section 4).

    The trust region is the filter's.

    ``response_mask`` holds the accepted tokens; with ``seq-mean-token-mean`` each sequence divides
    by its own. With one update per batch the ratio is 1 and the gradient is that of REINFORCE, GRPO
    or Dr.GRPO, whatever the advantages are.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.
        loss_agg_mode: verl's ``actor.loss_agg_mode``.
        config: verl's actor config, for the sizes of the global batch.
        rollout_is_weights: ``[B, T]``, corrections for the sampler's policy.

    Returns:
        The scalar loss and ``actor/ppo_kl``.
    """
    log_ratio = log_prob - old_log_prob
    losses = -advantages * log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    if rollout_is_weights is not None:
        losses = losses * rollout_is_weights
    global_batch = config.global_batch_info if config is not None else {}
    loss = agg_loss(
        loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **global_batch
    )
    return loss, {"actor/ppo_kl": verl_F.masked_mean(-log_ratio, response_mask).detach().item()}


@register_adv_est("reinforce")  # type: ignore[untyped-decorator]
@torch.no_grad()
def compute_reinforce_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """Advantages of ReinCAPO: every response token's is its sequence's reward, no baseline.

    Args:
        token_level_rewards: ``[B, T]``.
        response_mask: ``[B, T]``.

    Returns:
        Advantages and returns, both ``[B, T]``.
    """
    returns = token_level_rewards.sum(dim=-1, keepdim=True) * response_mask
    return returns, returns
