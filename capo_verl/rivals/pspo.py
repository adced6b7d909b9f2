# SPDX-License-Identifier: Apache-2.0
"""PSPO, probability smoothing (arXiv 2509.21282).

The new policy is mixed with the old one before the ratio is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, log_ratio, step_metrics


def loss_pspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    alpha: float,
) -> tuple[Tensor, Metrics]:
    """Losses ``-A ((1 - alpha) r + alpha)``, without a clip.

    The factor is the ratio of ``(1 - alpha) pi + alpha pi_old`` to ``pi_old``.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.

    Returns:
        Losses ``[B, T]``; ``ppo_kl`` and ``pg_clipfrac``, which is 0.
    """
    log_ratios = log_ratio(old_log_prob, log_prob)
    losses = -advantages * ((1 - alpha) * log_ratios.exp() + alpha)
    return losses, step_metrics(log_ratios, torch.zeros_like(log_ratios), response_mask)
