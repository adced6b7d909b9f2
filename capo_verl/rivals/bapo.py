# SPDX-License-Identifier: Apache-2.0
"""BAPO, balanced policy optimisation with adaptive clipping (arXiv 2510.18927)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from capo_verl.rivals.common import Metrics, clipped, log_ratio, step_metrics


def _count(start: float, end: float, step: float) -> int:
    """Number of candidates ``start, start + step, ..., end``; the last is always included."""
    return math.ceil((end - start) / step - 1e-9) + 1


def _candidates(start: float, end: float, step: float, like: Tensor) -> Tensor:
    """Candidates of a bound, ``[n]``, built on the device without a copy from the host."""
    steps = torch.arange(_count(start, end, step), dtype=like.dtype, device=like.device)
    return (start + step * steps).clamp(max=end)


def _first(good: Tensor) -> Tensor:
    """Index of the first True, or of the last candidate if there is none, ``[1]``."""
    return torch.where(good.any(), good.int().argmax(), len(good) - 1)[None]


@torch.no_grad()
def balanced_bounds(
    ratio: Tensor, advantages: Tensor, response_mask: Tensor, lows: Tensor, highs: Tensor,
    target: float, dp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The first bounds for which the positive mass is ``target`` times the negative one.

    The search is that of the authors' code.

    Positive mass: the sum of ``min(r, high) A`` over A >= 0; negative: of ``max(r, low) |A|`` over
    A < 0. First the lower bound goes through its candidates, with the first upper bound, until the
    target is met; then, if it is not, the upper one.

    Args:
        ratio, advantages, response_mask: ``[B, T]``; lows, highs: ``[n]`` and ``[m]``, the
            candidates.
        dp_group: ranks whose tokens count as well.

    Returns:
        The two bounds and positive over negative mass between them, 0-dim.
    """
    mass = torch.where(response_mask.bool(), advantages.abs(), 0.0)
    positive = advantages >= 0
    # The two masses depend on one bound each, so n + m sums are all that the search needs.
    up = torch.stack([(mass * ratio.clamp(max=high) * positive).sum() for high in highs.unbind()])
    down = torch.stack([(mass * ratio.clamp(min=low) * ~positive).sum() for low in lows.unbind()])
    if dp_group is not None:
        both = torch.cat([up, down])
        dist.all_reduce(both, group=dp_group)
        up, down = both.split([len(up), len(down)])
    # index_select, because indexing with a tensor of one element would wait for it.
    i = _first(up[0] >= target * down)
    j = _first(up >= target * down.index_select(0, i))
    low, high, up, down = (
        x.index_select(0, at)[0] for x, at in ((lows, i), (highs, j), (up, j), (down, i))
    )
    return low, high, up / down


def loss_bapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    target: float,
    low_start: float,
    low_max: float,
    low_step: float,
    high_start: float,
    high_max: float,
    high_step: float,
    dual_clip: float,
    dp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss between the balanced bounds of this (micro-)batch.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, T]``.
        dp_group: data-parallel ranks that choose their bounds together.

    Returns:
        Losses ``[B, T]``; ``pg_clipfrac``, ``ppo_kl``, ``bound_low``, ``bound_high``,
        ``mass_ratio`` (positive over negative).
    """
    log_ratios = log_ratio(old_log_prob, log_prob)
    ratio = log_ratios.exp()
    low, high, mass_ratio = balanced_bounds(
        ratio.detach(), advantages, response_mask, _candidates(low_start, low_max, low_step, ratio),
        _candidates(high_start, high_max, high_step, ratio), target, dp_group,
    )  # fmt: skip
    losses, replaced = clipped(ratio, advantages, low, high, dual_clip)
    metrics = step_metrics(log_ratios, replaced, response_mask)
    # Without negative mass it would be infinite, which no mean over micro-batches survives.
    mass_ratio = mass_ratio.nan_to_num(0.0, posinf=0.0)
    return losses, metrics | {"bound_low": low, "bound_high": high, "mass_ratio": mass_ratio}
