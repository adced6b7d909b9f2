# SPDX-License-Identifier: Apache-2.0
"""Advantages that grow with the probability of their token (arXiv 2505.12929).

"Do Not Let Low-Probability Tokens Over-Dominate in RL for LLMs".
"""

from __future__ import annotations

from torch import Tensor

from capo_verl.rivals.common import Metrics, clipped, log_ratio, step_metrics


def reweighted(advantages: Tensor, old_log_prob: Tensor, alpha: float) -> Tensor:
    """Advantages reweighted as in the paper, ``(alpha * pi_old + 1 - alpha) * A``, ``[B, T]``."""
    return (alpha * old_log_prob.exp() + (1 - alpha)) * advantages


def loss_advantage_reweighting(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    alpha: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss with reweighted advantages.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.

    Returns:
        Losses ``[B, T]``; ``pg_clipfrac`` and ``ppo_kl``.
    """
    log_ratios = log_ratio(old_log_prob, log_prob)
    weighted = reweighted(advantages, old_log_prob, alpha)
    losses, replaced = clipped(log_ratios.exp(), weighted, 1 - clip_low, 1 + clip_high, dual_clip)
    return losses, step_metrics(log_ratios, replaced, response_mask)
