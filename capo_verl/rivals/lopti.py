# SPDX-License-Identifier: Apache-2.0
"""Lopti, low-probability token isolation (arXiv 2505.12929).

"Do Not Let Low-Probability Tokens Over-Dominate in RL for LLMs".
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.advantage_reweighting import loss_advantage_reweighting
from capo_verl.rivals.common import Metrics, masked_mean


def loss_lopti(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    eta: float,
    alpha: float,
    part: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    epoch: int = 0,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss on one part of the tokens, 0 on the others.

    The part is that with ``pi_old < eta``, or the rest.

    The batch is to be used twice, on the low-probability tokens first. The denominators of the
    means stay those of all tokens, as in the authors' code, which sets the other advantages to 0.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.
        part: ``low``, ``high``, ``both``, or ``alternate``: ``low`` in even epochs and ``high`` in
            odd ones.
        epoch: how often this batch was used before. The old log-probabilities stay those of the
            sampler, so the parts agree.

    Returns:
        Losses ``[B, T]``; ``pg_clipfrac`` and ``ppo_kl`` over all tokens,
        ``low_probability_share``.
    """
    losses, metrics = loss_advantage_reweighting(
        old_log_prob, log_prob, advantages, response_mask,
        alpha=alpha, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
    )  # fmt: skip
    low = old_log_prob.exp() < eta
    metrics["low_probability_share"] = masked_mean(low, response_mask)
    if part == "alternate":
        part = "high" if epoch % 2 else "low"
    if part != "both":
        losses = torch.where(low if part == "low" else ~low, losses, 0.0)
    return losses, metrics
