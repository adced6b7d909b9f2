# SPDX-License-Identifier: Apache-2.0
"""ASPO, asymmetric importance sampling (arXiv 2510.06062).

Tokens of positive advantage weigh pi_old / pi.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, log_ratio, step_metrics


def loss_aspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Metrics]:
    """Losses ``-A w`` with gradient ``-A w grad log pi``.

    w = min(r, dual_clip) if A < 0 and w = min(1/r, dual_clip) otherwise.

    As with PPO's clip there is no gradient where A < 0 and r < 1 - clip_low, or A >= 0 and r > 1 +
    clip_high; the loss stays at the value it has there. Where ``dual_clip`` binds, the token keeps
    a gradient (the "soft" clip).

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.

    Returns:
        Losses ``[B, T]``; ``pg_clipfrac`` (hard clip), ``soft_clipfrac`` and ``ppo_kl``.
    """
    log_ratios = log_ratio(old_log_prob, log_prob)
    with torch.no_grad():
        ratio, negative = log_ratios.exp(), advantages < 0
        hard = torch.where(negative, ratio < 1 - clip_low, ratio > 1 + clip_high)
        weight = torch.where(
            negative, ratio.clamp(min=1 - clip_low), 1 / ratio.clamp(max=1 + clip_high)
        )
        soft = weight > dual_clip
        weight = weight.clamp(max=dual_clip)
    # Of value 1, with the gradient of log pi; not the clamped log-ratio, whose gradient ends where
    # it is clamped.
    flow = torch.where(hard, 1.0, (log_prob - log_prob.detach()).exp())
    metrics = step_metrics(log_ratios, hard, response_mask)
    metrics["soft_clipfrac"] = step_metrics(log_ratios, soft, response_mask)["pg_clipfrac"]
    return -advantages * weight * flow, metrics
