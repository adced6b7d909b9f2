# SPDX-License-Identifier: Apache-2.0
"""SPO, simple policy optimisation (arXiv 2401.16025).

A quadratic penalty on the ratio replaces PPO's clip.
"""

from __future__ import annotations

from torch import Tensor

from capo_verl.rivals.common import Metrics, log_ratio, step_metrics


def loss_spo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    epsilon: float,
) -> tuple[Tensor, Metrics]:
    """Losses ``-(r A - |A| (r - 1)^2 / (2 epsilon))``.

    They are least at r = 1 + sign(A) epsilon, and pull back from beyond.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.

    Returns:
        Losses ``[B, T]``; ``ppo_kl`` and ``pg_clipfrac``, here the share of tokens beyond the best
        ratio.
    """
    log_ratios = log_ratio(old_log_prob, log_prob)
    ratio = log_ratios.exp()
    moved = ratio - 1
    losses = advantages.abs() * moved.square() / (2 * epsilon) - advantages * ratio
    return losses, step_metrics(
        log_ratios, (moved * advantages.sign()).detach() > epsilon, response_mask
    )
