# SPDX-License-Identifier: Apache-2.0
"""EMPG, entropy-modulated policy gradients (arXiv 2509.09265).

The advantage of a turn shrinks with its entropy, and gains if the next turn is clear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.rivals.common import Metrics, masked_mean

_EPSILON = 1e-8


def empg_advantages(
    advantages: Tensor,
    response_mask: Tensor,
    *,
    entropy: Tensor,
    k: float,
    k_future: float,
    zeta: float,
) -> tuple[Tensor, Metrics]:
    """Advantages ``A g(H) + zeta f(H')`` of a turn, less their mean over all turns.

    A turn is an unbroken run of the response mask: what a tool says lies between two. H is the
    turn's mean entropy, from 0 to 1 over the batch, and H' that of the response's next turn, if
    there is one; ``g(H) = exp(-k H)`` over its mean, ``f(H) = exp(-k_future H)``.

    Args:
        advantages, response_mask: ``[B, T]``; entropy: ``[B, T]``, nats, of the old policy.

    Returns:
        Advantages ``[B, T]``; ``turns`` (mean per response), ``turn_entropy``.
    """
    mask = response_mask.bool()
    first = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
    turn = (first.flatten().cumsum(0) - 1).view_as(first)[mask]
    row, count = first.nonzero()[:, 0], int(first.sum())
    if not count:
        return advantages * mask, {
            "turns": masked_mean(advantages, mask), "turn_entropy": masked_mean(advantages, mask),
        }  # fmt: skip
    sizes = torch.bincount(turn, minlength=count)
    sums = torch.zeros(count, dtype=entropy.dtype, device=entropy.device)
    means = sums.index_add(0, turn, entropy[mask]) / sizes
    level = (means - means.min()) / (means.max() - means.min() + _EPSILON)
    scale = (-k * level).exp()
    scale = scale / (scale.mean() + _EPSILON)
    followed = torch.nn.functional.pad(row[1:] == row[:-1], (0, 1))
    bonus = torch.where(followed, zeta * (-k_future * level).exp().roll(-1), 0.0)
    modulated = torch.zeros_like(advantages)
    modulated[mask] = (advantages[mask] * scale[turn] + bonus[turn]).to(advantages.dtype)
    modulated[mask] -= modulated[first].mean()
    metrics = {
        "turns": masked_mean(first.sum(-1), mask.any(-1)),
        "turn_entropy": masked_mean(means, torch.ones_like(means)),
    }
    return modulated, metrics
