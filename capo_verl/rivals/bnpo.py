# SPDX-License-Identifier: Apache-2.0
"""BNPO, Beta normalisation (arXiv 2506.02864).

A group's rewards are centred, and divided by a Beta density which is fitted to the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, masked_mean, of_responses


def beta_parameters(means: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters of the density that normalises, from the mean rewards of all groups.

    Args:
        means: ``[G]``, in [0, 1].

    Returns:
        Two 0-dim tensors, at least 1; both 1, the uniform density, if all means are equal.
    """
    one = torch.ones((), dtype=means.dtype, device=means.device)
    if len(means) < 2 or not bool(means.var() > 0):
        return one, one
    mean, variance = means.mean(), means.var()
    size = mean * (1 - mean) / variance - 1
    return (1 + size * mean / 3).clamp(min=1), (1 + size * (1 - mean) / 3).clamp(min=1)


def bnpo_advantages(
    advantages: Tensor,
    response_mask: Tensor,
    *,
    group: Tensor,
    reward_min: float,
    reward_max: float,
    weight_max: float,
) -> tuple[Tensor, Metrics]:
    """Advantages ``(R - p) / f(p)``: p the mean reward of the group, f a Beta density.

    Args:
        advantages: the rewards, ``[B, T]``, equal for all tokens of a response.
        response_mask: ``[B, T]``; group: ``[B]`` int64, whole groups.

    Returns:
        Advantages ``[B, T]``; ``beta_a``, ``beta_b``, ``group_weight`` (mean over responses).

    Raises:
        ValueError: for rewards outside of ``[reward_min, reward_max]``.
    """
    mask = response_mask.bool()
    rewards = of_responses(advantages, mask)
    if bool((mask.any(-1) & ((rewards < reward_min) | (rewards > reward_max))).any()):
        raise ValueError(
            f"rival.reward_min={reward_min!r}, rival.reward_max={reward_max!r}: rewards from "
            f"{float(rewards.min()):g} to {float(rewards.max()):g} are outside; set both to the "
            "range of the rewards"
        )
    scores = (rewards - reward_min) / (reward_max - reward_min)
    _, member, size = torch.unique(group, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(size), dtype=scores.dtype, device=scores.device)
    means = sums.index_add(0, member, scores) / size
    means = torch.where(size > 1, means, 0.0)  # one response says nothing about its prompt
    a, b = beta_parameters(means)
    log_density = (
        torch.xlogy(a - 1, means)
        + torch.xlogy(b - 1, 1 - means)
        - (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b))
    )
    weight = (-log_density).exp().clamp(max=weight_max)[member]
    normalised = weight * (scores - means[member])
    metrics = {
        "beta_a": a, "beta_b": b, "group_weight": masked_mean(weight, mask.any(-1)),
    }  # fmt: skip
    return normalised[:, None] * mask, metrics
