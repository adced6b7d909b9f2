# SPDX-License-Identifier: Apache-2.0
"""DCPO's dynamic-adaptive clipping (arXiv 2509.02333).

The rarer a token was, the further its ratio may move.
"""

from __future__ import annotations

from torch import Tensor

from capo_verl.rivals.common import Metrics, clipped, log_ratio, step_metrics


def dynamic_bounds(
    old_log_prob: Tensor, eps_low: float, eps_high: float, ratio_max: float
) -> tuple[Tensor, Tensor]:
    """Bounds of r, from ``|(r - 1) p| <= eps`` with p = r q the new and q the old probability.

    ``1/2 + sqrt(max(0, 1 - 4 eps_low / q)) / 2`` and ``1/2 + sqrt(1 + 4 eps_high / q) / 2``, at
    most ``ratio_max``. ``[B, T]``
    """
    rarity = 4 * (-old_log_prob).exp()
    low = 0.5 + 0.5 * (1 - eps_low * rarity).clamp(min=0).sqrt()
    high = 0.5 + 0.5 * (1 + eps_high * rarity).sqrt()
    return low, high.clamp(max=ratio_max)


def loss_dcpo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    ratio_max: float,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss between dynamic bounds.

    For negative advantages it is at most ``-ratio_max A`` as well.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``. The old log-probabilities
            need no gradient.

    Returns:
        Losses ``[B, T]``; ``pg_clipfrac`` and ``ppo_kl``.
    """
    log_ratios = log_ratio(old_log_prob, log_prob)
    low, high = dynamic_bounds(old_log_prob, eps_low, eps_high, ratio_max)
    losses, replaced = clipped(log_ratios.exp(), advantages, low, high, ratio_max)
    return losses, step_metrics(log_ratios, replaced, response_mask)
