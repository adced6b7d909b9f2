# SPDX-License-Identifier: Apache-2.0
"""Advantages and losses of the loop.

A loss is the plain policy gradient, a rival of this package, or one of verl's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capo_verl.experiments.study.config import LoopConfig

_MAX_LOG_RATIO = 20.0


class Batch(NamedTuple):
    """A mini-batch as a loss sees it; ``[B, T]`` unless said otherwise."""

    old_log_prob: Tensor
    log_prob: Tensor
    advantages: Tensor
    mask: Tensor
    """bool, the tokens to train on."""
    response_mask: Tensor
    """bool, all response tokens: what denominators count."""
    entropy: Tensor
    group: Tensor
    """``[B]`` int64: which prompt."""
    tokens: Tensor
    """int64, the taken tokens."""


def group_advantages(rewards: Tensor, group: int, kind: str) -> Tensor:
    """Advantages of completions whose groups are neighbours.

    Args:
        rewards: ``[B]``.
        group: completions per prompt.
        kind: ``grpo`` (r - mean) / (std + 1e-4), std with Bessel's correction as verl; ``dr_grpo``
            r - mean; ``reinforce`` r.

    Returns:
        ``[B]``.
    """
    if kind == "reinforce":
        return rewards
    r = rewards.view(-1, group)
    centred = r - r.mean(-1, keepdim=True)
    if kind == "grpo" and group > 1:
        centred = centred / (r.std(-1, keepdim=True) + 1e-4)
    return centred.flatten()


def aggregate(losses: Tensor, batch: Batch, mode: str) -> Tensor:
    """verl's ``agg_loss`` with the sizes of the whole mini-batch, as its engines pass them.

    A sequence divides by its own trained tokens with ``seq-mean-token-mean``; sequences and, with
    ``token-mean``, tokens that are not trained count in the denominator of the mean.

    Args:
        losses: ``[B, T]``.

    Returns:
        Scalar.
    """
    kept = torch.where(batch.mask, losses, 0.0)
    if mode == "token-mean":
        return kept.sum() / batch.response_mask.sum()
    per_sequence = kept.sum(-1)
    if mode == "seq-mean-token-mean":
        return (per_sequence / (batch.mask.sum(-1) + 1e-8)).mean()
    return per_sequence.mean() / losses.shape[1]


def policy_loss(config: LoopConfig, batch: Batch, epoch: int = 0) -> Tensor:
    """The scalar policy loss which ``config.loss`` names.

    ``epoch`` counts how often the batch was used before.

    Raises:
        ValueError: for an unknown loss or knob.
    """
    if config.loss == "pg":
        ratio = (batch.log_prob - batch.old_log_prob).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
        return aggregate(-batch.advantages * ratio, batch, config.aggregation)
    if config.loss.startswith("verl:"):
        return _verl_loss(config, batch)
    return _rival_loss(config, batch, epoch)


def _rival_loss(config: LoopConfig, batch: Batch, epoch: int) -> Tensor:
    from capo_verl.rivals import RIVALS

    if config.loss not in RIVALS:
        raise ValueError(
            f"loss={config.loss!r}: expected pg, verl:NAME or one of {', '.join(RIVALS)}"
        )
    rival = RIVALS[config.loss]
    inputs = {name: epoch if name == "epoch" else getattr(batch, name) for name in rival.needs}
    losses, _ = rival(
        batch.old_log_prob,
        batch.log_prob,
        batch.advantages,
        batch.mask,
        **inputs,
        **config.loss_knobs,
    )
    return aggregate(losses, batch, config.aggregation)


def _verl_loss(config: LoopConfig, batch: Batch) -> Tensor:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    actor = _verl_config(repr(sorted(config.loss_knobs.items())), _Knobs(config.loss_knobs))
    # Of the whole mini-batch; verl's engines fill this in for every update.
    actor.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=batch.response_mask.sum(),
        global_batch_size=len(batch.mask),
        loss_scale_factor=batch.mask.shape[1],
    )
    loss, _ = get_policy_loss_fn(config.loss.removeprefix("verl:"))(
        old_log_prob=batch.old_log_prob, log_prob=batch.log_prob, advantages=batch.advantages,
        response_mask=batch.mask.float(), loss_agg_mode=config.aggregation, config=actor,
    )  # fmt: skip
    return loss


class _Knobs(dict[str, Any]):
    def __hash__(self) -> int:  # type: ignore[override]
        return 0  # the text beside it tells them apart


@lru_cache(maxsize=8)
def _verl_config(_text: str, knobs: _Knobs) -> Any:
    from dataclasses import fields

    from verl.workers.config import ActorConfig, PolicyLossConfig

    known = {f.name for f in fields(ActorConfig)}
    unknown = sorted(set(knobs) - known)
    if unknown:
        raise ValueError(f"loss_knobs.{unknown[0]} is no field of verl's ActorConfig")
    settings = {**knobs, "policy_loss": PolicyLossConfig(**knobs.get("policy_loss", {}))}
    return ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **settings)
