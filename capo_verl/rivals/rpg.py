# SPDX-License-Identifier: Apache-2.0
"""RPG, KL-regularised policy gradients (arXiv 2505.17508).

The variant with stop-gradients and clipped importance weights; the reference is the old policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, log_ratio, masked_mean, step_metrics


def kl_gradient(bounded: Tensor, kl: str) -> Tensor:
    """Weight of grad log pi with which a divergence from the old policy falls, per token.

    Args:
        bounded: clipped ratios, ``[B, T]``.
        kl: ``fkl``, ``rkl``, or unnormalised: ``ufkl``, ``urkl``.
    """
    if kl == "fkl":
        return torch.ones_like(bounded)
    if kl == "ufkl":
        return 1 - bounded
    return -bounded * (bounded.log() + (1.0 if kl == "rkl" else 0.0))


def loss_rpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl: str,
    kl_coef: float,
    dual_clip: float,
) -> tuple[Tensor, Metrics]:
    """Losses with gradient ``-(r A + kl_coef k) grad log pi``, none where PPO's dual clip has none.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.

    Returns:
        Losses ``[B, T]``; ``pg_clipfrac``, ``ppo_kl`` and ``kl_weight``, the mean of ``kl_coef k``.
    """
    log_ratios = log_ratio(old_log_prob, log_prob).detach()
    ratio = log_ratios.exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    pull = kl_coef * kl_gradient(bounded, kl)
    cut = torch.where(
        advantages > 0, ratio >= 1 + clip_high, (ratio < 1 - clip_low) | (ratio >= dual_clip)
    )
    # At a cut token the loss keeps the value that it has at the bound.
    bound = torch.where(advantages > 0, 1 + clip_high, ratio.clamp(1 - clip_low, dual_clip))
    weight = torch.where(cut, bound, ratio)
    metrics = step_metrics(log_ratios, cut, response_mask)
    metrics["kl_weight"] = masked_mean(pull, response_mask)
    moving = (log_prob - log_prob.detach()).exp()
    return -(weight * advantages + pull) * torch.where(cut, 1.0, moving), metrics
