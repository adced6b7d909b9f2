# SPDX-License-Identifier: Apache-2.0
"""GTPO, group-relative trajectory-based policy optimisation (arXiv 2508.03772).

It masks conflicts and controls the entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, masked_mean


def _in_conflict(
    tokens: Tensor, position: Tensor, group: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """True for a token in good and in bad responses of its group, at the same position.

    Good and bad are those of positive and of negative advantage.
    """
    vocabulary, length = tokens.max() + 1, tokens.shape[1]
    keys = (group[:, None] * length + position) * vocabulary + tokens
    active = mask & (advantages != 0)
    distinct, where = torch.unique(keys[active], return_inverse=True)
    signs = torch.zeros(2, len(distinct), dtype=torch.bool, device=tokens.device)
    positive = advantages[active] > 0
    signs[0, where[positive]] = True
    signs[1, where[~positive]] = True
    conflict = torch.zeros_like(mask)
    conflict[active] = (signs[0] & signs[1])[where]
    return conflict


def _leading_run(conflict: Tensor, mask: Tensor) -> Tensor:
    """The conflicts before the first response token that is in none. ``[B, T]`` bool"""
    return (conflict | ~mask).int().cumprod(-1).bool() & conflict


def conflict_weights(
    advantages: Tensor, response_mask: Tensor, tokens: Tensor, group: Tensor, conflict_weight: float
) -> tuple[Tensor, Tensor]:
    """Weights of the tokens that good and bad responses of a group share at both ends.

    Positions are counted from the first response token, and a second time from the last one. A
    token in conflict weighs ``conflict_weight`` where the advantage is positive and 0 where it is
    negative; the weights of both counts multiply.

    Args:
        advantages, response_mask, tokens: ``[B, T]``; group: ``[B]`` int64, non-negative, equal for
            responses to one prompt.

    Returns:
        Weights ``[B, T]`` (1 outside of conflicts) and where there is a conflict (bool).
    """
    mask = response_mask.bool()
    order = mask.int().cumsum(-1)
    weights, conflicts = torch.ones_like(advantages), torch.zeros_like(mask)
    of_sign = torch.where(advantages > 0, conflict_weight, 0.0).to(weights.dtype)
    for position, flipped in ((order - 1, False), (order[:, -1:] - order, True)):
        conflict = _in_conflict(tokens, position, group, advantages, mask)
        run = (
            _leading_run(conflict.flip(-1), mask.flip(-1)).flip(-1)
            if flipped
            else _leading_run(conflict, mask)
        )
        weights = torch.where(run, weights * of_sign, weights)
        conflicts |= run
    return weights, conflicts


@torch.no_grad()
def gtpo_advantages(
    advantages: Tensor,
    response_mask: Tensor,
    *,
    tokens: Tensor,
    group: Tensor,
    entropy: Tensor | None = None,
    conflict_weight: float,
    entropy_max: float | None,
    entropy_scale: float,
    divide_by_conflicts: bool,
) -> tuple[Tensor, Metrics]:
    """Advantages ``lambda (A - entropy_scale * H)``, 0 if ``H > entropy_max``.

    H is the response's mean entropy, lambda its conflict weights.

    Args:
        advantages, response_mask, tokens: ``[B, T]``, whole groups; group: ``[B]``; entropy: ``[B,
            T]``, nats, not looked at if ``entropy_max`` is None.

    Returns:
        Advantages ``[B, T]``; ``conflict_share`` (tokens), ``high_entropy_share`` (responses).

    Raises:
        ValueError: if entropies are needed and missing.
    """
    weights, conflicts = conflict_weights(advantages, response_mask, tokens, group, conflict_weight)
    metrics = {"conflict_share": masked_mean(conflicts, response_mask)}
    if entropy_max is not None:
        if entropy is None:
            raise ValueError(
                f"rival.entropy_max={entropy_max!r} needs the entropies of the tokens; set it to "
                "null"
            )
        mask = response_mask.to(entropy.dtype)
        count = mask.sum(-1)
        mean = (entropy * mask).sum(-1) / count.clamp(min=1)
        metrics["high_entropy_share"] = masked_mean(mean > entropy_max, count > 0)
        kept = (mean <= entropy_max)[:, None]
        advantages = torch.where(kept, advantages - entropy_scale * mean[:, None], 0.0).to(
            advantages.dtype
        )
    advantages = advantages * weights
    if divide_by_conflicts:
        advantages = advantages / conflicts.sum(-1, keepdim=True).clamp(min=1)
    return advantages * response_mask, metrics
