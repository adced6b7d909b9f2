# SPDX-License-Identifier: Apache-2.0
"""Parts that the rival losses share: the ratio, PPO's clip and masked means.

Everything is per token, ``[B, T]``.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Largest log-ratio, as in verl's own losses: exp() of more could overflow."""

Metrics = dict[str, Tensor]
"""0-dim tensors on the device of the losses, without gradient."""

Bound = TypeVar("Bound", Tensor, float)
"""A bound of the ratio: per token, or one number."""


def log_ratio(old_log_prob: Tensor, log_prob: Tensor) -> Tensor:
    """Log-ratio ``log pi / pi_old`` (nats), cut to +-20."""
    return (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of the mask, 0 if there are none; 0-dim, without gradient."""
    values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    mask = mask.to(values.dtype)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def clipped(
    ratio: Tensor,
    advantages: Tensor,
    low: Bound,
    high: Bound,
    dual: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PPO's clip, ``max(-r A, -clip(r, low, high) A)``.

    For negative advantages at most ``-dual A`` (arXiv 1912.09729).

    Args:
        low, high: bounds of the ratio itself; both tensors that broadcast, or both numbers.

    Returns:
        Losses, and where the ratio's own term was replaced (bool).
    """
    own = -advantages * ratio
    bounded = -advantages * torch.clamp(ratio, low, high)
    losses, replaced = torch.maximum(own, bounded), bounded > own
    if dual is not None:
        limit = -advantages * dual
        beyond = (advantages < 0) & (losses > limit)
        losses, replaced = torch.where(beyond, limit, losses), replaced | beyond
    return losses, replaced


def step_metrics(log_ratios: Tensor, replaced: Tensor, mask: Tensor) -> Metrics:
    """Metrics under verl's names.

    ``pg_clipfrac``, the share of tokens whose gradient was cut, and ``ppo_kl``, the mean of -log
    ratio.
    """
    return {"pg_clipfrac": masked_mean(replaced, mask), "ppo_kl": masked_mean(-log_ratios, mask)}


def of_responses(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of a response's tokens, ``[B]``; 0 for one without any."""
    mask = mask.to(values.dtype)
    return (values * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def loss_on_policy(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor
) -> tuple[Tensor, Metrics]:
    """Losses ``-A``, with gradient ``-A grad log pi``: neither ratio nor clip. All ``[B, T]``."""
    metrics = {"ppo_kl": masked_mean(old_log_prob - log_prob, response_mask)}
    return -advantages * (log_prob - log_prob.detach()).exp(), metrics


def loss_clipped(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped losses between ``1 - clip_low`` and ``1 + clip_high``. All ``[B, T]``."""
    log_ratios = log_ratio(old_log_prob, log_prob)
    losses, replaced = clipped(log_ratios.exp(), advantages, 1 - clip_low, 1 + clip_high, dual_clip)
    return losses, step_metrics(log_ratios, replaced, response_mask)
