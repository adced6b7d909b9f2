# SPDX-License-Identifier: Apache-2.0
"""PACS, implicit actor-critic coupling by supervised learning (arXiv 2509.02522).

Whether a response is good is predicted from its log-ratios, by cross-entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, log_ratio, loss_on_policy, masked_mean, of_responses


def _less_the_others(values: Tensor, group: Tensor) -> Tensor:
    """Each response's value less the mean of the others of its group. ``[B]``"""
    _, member, size = torch.unique(group, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(size), dtype=values.dtype, device=values.device)
    sums = sums.index_add(0, member, values)
    others = (size[member] - 1).clamp(min=1)
    return torch.where(size[member] > 1, values - (sums[member] - values) / others, values)


@torch.no_grad()
def pacs_advantages(
    advantages: Tensor,
    response_mask: Tensor,
    *,
    group: Tensor,
    beta: float,
    balance: bool,
    log_ratios: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Weights of grad log pi in the cross-entropy of the labels, negated.

    A response is good if its advantage is positive. Its score is beta times the sum of its
    log-ratios, less the mean of the others' of its group.

    Args:
        advantages, response_mask: ``[B, T]``, whole groups; group: ``[B]`` int64.
        log_ratios: ``[B, T]``, nats; None: all 0, as in the first update of a batch.

    Returns:
        Advantages ``[B, T]``; ``cross_entropy`` (mean over responses, nats).
    """
    mask = response_mask.bool()
    good = (of_responses(advantages, mask) > 0).to(advantages.dtype)
    score = torch.zeros_like(good)
    if log_ratios is not None:
        score = _less_the_others(beta * (log_ratios * mask).sum(-1), group)
    weight = torch.ones_like(good)
    if balance:
        _, member, size = torch.unique(group, return_inverse=True, return_counts=True)
        counts = torch.zeros(len(size), dtype=good.dtype, device=good.device)
        counts = counts.index_add(0, member, good)[member]
        own = torch.where(good.bool(), counts, size[member] - counts)
        mixed = (counts > 0) & (counts < size[member])
        weight = torch.where(mixed, size[member] / (2 * own.clamp(min=1)), weight)
    losses = weight * torch.nn.functional.binary_cross_entropy_with_logits(
        score, good, reduction="none"
    )
    pull = beta * _less_the_others(weight * (good - score.sigmoid()), group)
    return pull[:, None] * mask, {"cross_entropy": masked_mean(losses, torch.ones_like(losses))}


def loss_pacs(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    group: Tensor,
    beta: float,
    balance: bool,
) -> tuple[Tensor, Metrics]:
    """Losses whose gradient is that of the cross-entropy, summed over tokens.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``, whole groups; group: ``[B]``.

    Returns:
        Losses ``[B, T]``; ``ppo_kl``, ``cross_entropy``.
    """
    weights, metrics = pacs_advantages(
        advantages, response_mask, group=group, beta=beta, balance=balance,
        log_ratios=log_ratio(old_log_prob, log_prob),
    )  # fmt: skip
    losses, more = loss_on_policy(old_log_prob, log_prob, weights, response_mask)
    return losses, metrics | more
