# SPDX-License-Identifier: Apache-2.0
"""Loss on the tokens of highest entropy ("Beyond the 80/20 Rule", arXiv 2506.01939)."""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, clipped, log_ratio, step_metrics


def highest_entropy(entropy: Tensor, response_mask: Tensor, top_share: float) -> Tensor:
    """The ``ceil(top_share * n)`` of the n response tokens whose entropy is highest.

    Ties go in order of position.

    Args:
        entropy: ``[B, T]``, nats; response_mask: ``[B, T]``.

    Returns:
        ``[B, T]`` bool.
    """
    mask = response_mask.bool().flatten()
    order = (
        entropy.detach()
        .flatten()
        .masked_fill(~mask, -torch.inf)
        .argsort(descending=True, stable=True)
    )
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    # 1e-4 less than a whole token, so that 0.2 * 15 is 3 although its double is a little more.
    count = (mask.sum() * float(top_share) + 0.9999).floor().clamp(min=1)
    return ((rank < count) & mask).view_as(response_mask)


def loss_entropy_mask(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    entropy: Tensor,
    top_share: float,
    normalise_by: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss on the ``top_share`` tokens of highest entropy, 0 on the others.

    With ``normalise_by="selected"`` the losses are scaled by n / n_selected, so that a mean over
    all response tokens is one over the selected tokens.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.
        entropy: ``[B, T]``, of the policy's distribution at each token (nats); of which policy is
            the caller's choice.

    Returns:
        Losses ``[B, T]``; ``pg_clipfrac`` and ``ppo_kl`` over the selected tokens,
        ``selected_share``.
    """
    selected = highest_entropy(entropy, response_mask, top_share)
    log_ratios = log_ratio(old_log_prob, log_prob)
    losses, replaced = clipped(log_ratios.exp(), advantages, 1 - clip_low, 1 + clip_high, dual_clip)
    tokens, kept = response_mask.sum().to(losses.dtype), selected.sum().to(losses.dtype)
    scale = tokens / kept.clamp(min=1) if normalise_by == "selected" else 1.0
    metrics = step_metrics(log_ratios, replaced, selected)
    metrics["selected_share"] = (kept / tokens.clamp(min=1)).detach()
    return torch.where(selected, losses * scale, 0.0), metrics
