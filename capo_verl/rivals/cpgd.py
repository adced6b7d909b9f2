# SPDX-License-Identifier: Apache-2.0
"""CPGD, clipped policy gradient with policy drift (arXiv 2505.12504)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, log_ratio, masked_mean, step_metrics


def loss_cpgd(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    drift: float,
    drift_cap: float,
) -> tuple[Tensor, Metrics]:
    """Losses of clipped policy gradient with drift, l the log-ratio.

    ``-min(l A, clip(l, log(1 - clip_low), log(1 + clip_high)) A) + drift * sg(min(r - 1,
    drift_cap)) l``

    The first term is a policy gradient without the ratio as its weight; the second has the gradient
    of KL(pi_old || pi), ``(r - 1) grad log pi``, with a bounded weight.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.

    Returns:
        Losses ``[B, T]``; ``pg_clipfrac``, ``ppo_kl`` and ``policy_drift``, the mean of the second
        term without its factor.
    """
    log_ratios = log_ratio(old_log_prob, log_prob)
    # log(0), of clip_low = 1, is no bound at all.
    low, high = math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)
    own, bounded = log_ratios * advantages, log_ratios.clamp(low, high) * advantages
    drifts = log_ratios.detach().expm1().clamp(max=drift_cap) * log_ratios
    metrics = step_metrics(log_ratios, bounded < own, response_mask)
    metrics["policy_drift"] = masked_mean(drifts, response_mask)
    return drift * drifts - torch.minimum(own, bounded), metrics
