# SPDX-License-Identifier: Apache-2.0
"""Controls that leave tokens out of the loss: at random, or by a rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kept_at_random(
    response: Tensor, random: torch.Generator, share: float, count: int | None
) -> Tensor:
    """Mask ``[B, T]`` bool without tokens that are dropped at random.

    Args:
        response: ``[B, T]`` bool, the tokens.
        share: probability with which each is dropped; unused with ``count``.
        count: number of tokens to drop, or None.
    """
    if count is not None:
        draws = torch.rand(response.shape, generator=random).masked_fill(~response, -1.0)
        kept = torch.ones_like(response)
        kept.view(-1)[draws.flatten().topk(min(count, int(response.sum()))).indices] = False
        return kept
    if share:
        return torch.rand(response.shape, generator=random) >= share
    return torch.ones_like(response)


def weights_of_selection(
    select: dict[str, Any], mask: Tensor, advantages: Tensor, entropy: Tensor,
    policy_shift: Tensor | None,
) -> Tensor:  # fmt: skip
    """Weights ``[B, T]`` of the tokens, all 1 but those of the share with an advantage that ranks
    highest.

    Args:
        select: ``LoopConfig.select``.
        mask: ``[B, T]`` bool; advantages, entropy, policy_shift: ``[B, T]``.
    """
    if select["by"] == "policy_shift":
        assert policy_shift is not None, "select.by=policy_shift needs capo.mode=track"
        score = policy_shift
    else:
        score = entropy if select["by"] == "entropy" else -entropy
    counted = mask & (advantages != 0)
    score = torch.where(counted, score, -torch.inf)
    count = min(max(1, round(select["share"] * int(mask.sum()))), int(counted.sum()))
    if count == 0:
        return torch.ones_like(advantages)
    top = score.flatten().topk(count)
    weights = torch.ones_like(advantages)
    if select.get("soft"):
        least = top.values[-1]
        return torch.where(score > least, (least / score.clamp(min=1e-30)).sqrt(), weights)
    # By index: completions of a group share prefixes, so ties are common.
    weights.view(-1)[top.indices] = 0.0
    return weights
