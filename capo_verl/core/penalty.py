# SPDX-License-Identifier: Apache-2.0
"""The shifts as a penalty on the logits: ``lambda_F m_F - lambda_H m_H`` of every token.

With ``u = P(g) h`` held fixed and pi the softmax of the logits z over the support (``curvature.py``
for d, e, s):

    d e / d z_j = pi_j (u_j - e)
    d s / d z_j = pi_j (u_j^2 - s)
    d d / d z_j = -pi_j (u_j - e)

so the gradient of either shift is ``a de/dz + b ds/dz`` with two numbers per token:

              a                              b
    m_F       -lr^2 d                        0                sampled
              -lr^2 e                        lr^2 / 2         exact
    m_H       -lr A - lr^2 A (d - e)         -lr^2 A / 2

Nothing but those products is kept until the backward pass, one number per entry of the support.
With a vocabulary sharded over ranks every rank puts the gradient on its own rows, as
vocabulary-parallel cross-entropies do.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.core import collectives
from capo_verl.core.curvature import Shifts, shifts_of
from capo_verl.core.optimizer_model import OptimizerModel
from capo_verl.core.support import Support, TopKSupport
from capo_verl.core.validation import Inputs


class PenaltyTerms(NamedTuple):
    """The penalty and its gradient, in the order of the N tokens evaluated."""

    value: Tensor
    """``[...]`` of the shape of ``actions``; 0 outside the response mask."""
    gradient: Tensor
    """``[N, c]``, with respect to the logits as given, before any temperature; 0 for other ranks'
    rows.
    """
    places: Tensor
    """``[N, c]`` int64, their place among the logits ``[M, rows]`` flattened; ``M * rows`` = none.
    """
    positions: Tensor | None
    """``[N]`` int64, place of each token among the M; None if N = M."""


def penalises(config: CapoConfig) -> bool:
    """True if the config asks for a penalty; a filter that only tracks adds none."""
    return config.mode == "filter" and (config.policy_penalty > 0 or config.objective_penalty > 0)


def curvature_penalty(logits: Tensor, terms: PenaltyTerms) -> Tensor:
    """The penalty of every token, differentiable through the logits; the gradient counts once.

    Args:
        logits: ``[..., rows]``, those of ``CapoFilter.evaluate``, part of a graph. May be
            overwritten in place afterwards.
        terms: what that call returned as ``penalty_terms``.

    Returns:
        ``[...]`` in the compute dtype.

    Raises:
        ValueError: if the logits do not have the shape of those evaluated.
    """
    if logits.shape[:-1] != terms.value.shape:
        raise ValueError(
            f"logits: expected {[*terms.value.shape]} and the vocabulary rows, as evaluated, got "
            f"{[*logits.shape]}"
        )
    return cast(Tensor, _FixedDirection.apply(logits, terms))  # type: ignore[no-untyped-call]


class _FixedDirection(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, terms: PenaltyTerms) -> Tensor:
        # Not the logits: trainers overwrite them.
        ctx.shape, ctx.dtype, ctx.terms = logits.shape, logits.dtype, terms
        return terms.value.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, None]:
        terms: PenaltyTerms = ctx.terms
        factor = incoming[0].flatten()
        if terms.positions is not None:
            factor = factor[terms.positions]
        gradient = (factor[:, None] * terms.gradient).to(ctx.dtype)
        flat = torch.zeros(ctx.shape.numel() + 1, device=gradient.device, dtype=ctx.dtype)
        flat[terms.places.flatten()] = (
            gradient.flatten()
        )  # no place twice, except the one that is cut off
        return flat[:-1].view(ctx.shape), None


def token_shifts_and_terms(
    model: OptimizerModel,
    support: Support,
    inputs: Inputs,
    config: CapoConfig,
    rows: int,
    first_token: int,
    tp_group: collectives.Group,
) -> tuple[Shifts, PenaltyTerms]:
    """Shifts of every token along its own gradient, as ``curvature.token_shifts``, and the terms of
    their penalty.

    Args:
        inputs: the N tokens, advantages in the compute dtype.
        rows: of the logits on this rank, padding included.
        first_token: which of the call's tokens the first of these is.

    Returns:
        Shifts ``[N]`` each, and terms whose ``value`` is ``[N]``.
    """
    lr, advantages, exact = inputs.learning_rate, inputs.advantages, config.policy_shift == "exact"
    probs, row, held = _entries(support)
    u = torch.zeros_like(probs)
    sums = model.partial_sums(inputs.hidden, advantages, support, u)
    collectives.sum_(sums, (tp_group,))
    shifts = shifts_of(sums, advantages, lr, exact=exact)
    u_taken, mean, mean_square = sums.unbind(-1)
    d = u_taken - mean

    first = config.objective_penalty * lr * advantages * (1 + lr * (d - mean))
    second = config.objective_penalty * 0.5 * lr**2 * advantages
    if exact:
        first, second = (
            first - config.policy_penalty * lr**2 * mean,
            second + config.policy_penalty * 0.5 * lr**2,
        )
    else:
        first = first - config.policy_penalty * lr**2 * d
    gradient = probs * (
        first[:, None] * (u - mean[:, None]) + second[:, None] * (u.square() - mean_square[:, None])
    )
    if inputs.temperature is not None:
        gradient = gradient / inputs.temperature[:, None]
    counts = held & inputs.mask[:, None]
    place = inputs.positions
    if place is None:
        place = torch.arange(first_token, first_token + len(probs), device=probs.device)
    nowhere = inputs.shape.numel() * rows
    index = torch.where(counts, place[:, None] * rows + row, nowhere)
    value = config.policy_penalty * shifts.policy - config.objective_penalty * shifts.objective
    terms = PenaltyTerms(
        torch.where(inputs.mask, value, 0.0),
        torch.where(counts, gradient, 0.0),
        index,
        inputs.positions,
    )
    return shifts, terms


def joined_terms(parts: list[PenaltyTerms], inputs: Inputs) -> PenaltyTerms:
    """Join the terms of all N tokens from their blocks in order."""
    value, gradient, index = (
        torch.cat(x)
        for x in ([getattr(p, name) for p in parts] for name in PenaltyTerms._fields[:3])
    )
    return PenaltyTerms(inputs.restore(value), gradient, index, inputs.positions)


def _entries(support: Support) -> tuple[Tensor, Tensor, Tensor]:
    """Probability, row of this rank and whether it is one, of every entry of the support: ``[N,
    c]`` each.
    """
    if isinstance(support, TopKSupport):
        row = support.ids - support.shard.start
        return support.probs, row, (row >= 0) & (row < support.shard.rows)
    probs = torch.cat(
        [part for _, part, _ in support.all_rows()] or [support.log_normaliser.new_zeros(0, 0)]
    )
    row = torch.arange(probs.shape[1], device=probs.device).expand_as(probs)
    return probs, row, torch.ones_like(probs, dtype=torch.bool)
