# SPDX-License-Identifier: Apache-2.0
"""MinPRO, minimum prefix ratio (arXiv 2601.22718).

It is a bounded stand-in for the ratio of the whole prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, log_ratio, masked_mean, step_metrics


def prefix_minimum(log_ratios: Tensor, response_mask: Tensor) -> Tensor:
    """The least log-ratio among the response tokens before each token; 0 (ratio 1) for the first.

    ``[B, T]``
    """
    masked = log_ratios.masked_fill(~response_mask.bool(), torch.inf)
    before = torch.nn.functional.pad(masked[:, :-1], (1, 0), value=torch.inf)
    least = before.cummin(dim=-1).values
    return least.masked_fill(least.isinf(), 0.0)


def loss_minpro(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    weight_max: float,
) -> tuple[Tensor, Metrics]:
    """Losses ``-A w`` with gradient ``-A w grad log pi``.

    ``w = min(r_t * min_{j < t} r_j, weight_max)``, without gradient.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``, whole responses in order.

    Returns:
        Losses ``[B, T]``; ``pg_clipfrac`` (tokens at ``weight_max``), ``ppo_kl`` and
        ``prefix_weight``, the mean of the least ratio.
    """
    log_ratios = log_ratio(old_log_prob, log_prob)
    with torch.no_grad():
        least = prefix_minimum(log_ratios, response_mask)
        weight = (log_ratios + least).exp()
    metrics = step_metrics(log_ratios, weight > weight_max, response_mask)
    metrics["prefix_weight"] = masked_mean(least.exp(), response_mask)
    return -advantages * weight.clamp(max=weight_max) * (
        log_prob - log_prob.detach()
    ).exp(), metrics
