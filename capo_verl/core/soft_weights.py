# SPDX-License-Identifier: Apache-2.0
"""Weights in place of decisions: ``w = min(1, sqrt(tau_F / m_F))``, and the balance of positive and
negative advantages.

m_F is quadratic in the gradient, so a token with weight w has the shift ``w^2 m_F <= tau_F``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from capo_verl.core import collectives


def soft_weights(policy_shift: Tensor, tau: float | Tensor) -> Tensor:
    """``min(1, sqrt(tau / m_F))``, of the shape and dtype of ``policy_shift``; 0 where that is
    NaN.
    """
    inside = policy_shift <= tau
    root = tau.to(policy_shift.dtype).sqrt() if isinstance(tau, Tensor) else math.sqrt(tau)
    return torch.where(inside, 1.0, root / policy_shift.sqrt()).nan_to_num(nan=0.0)


class SignBalance:
    """Scales the sign of the advantage that kept more, so that both keep the same share of their
    mass.

    With ``k(sign) = sum w |A| / sum |A|`` over the tokens of that sign in one optimizer step, on
    all ranks, the next step's factors are ``min(1, k(-) / k(+))`` for A > 0 and ``min(1, k(+) /
    k(-))`` for A < 0: a step behind, so that they do not depend on how a step is cut into
    micro-batches.

    Attributes:
        factors: ``[2]`` float64 on the device, for positive and negative advantages.
    """

    def __init__(self, device: torch.device, groups: Sequence[collectives.Group]):
        self._groups = groups
        self.factors = torch.ones(2, device=device, dtype=torch.float64)
        self.discard()

    def discard(self) -> None:
        """Forget the tokens seen since the last step."""
        self._sums: list[Tensor] = []

    def move(self, device: torch.device) -> None:
        self.factors = self.factors.to(device)

    def add(self, weights: Tensor, advantages: Tensor, mask: Tensor) -> None:
        """Some of the step's tokens, ``[N]`` each: weights before balancing, and the mask of those
        that count.
        """
        signs = torch.stack((mask & (advantages > 0), mask & (advantages < 0)))
        mass = torch.where(signs, advantages.abs(), 0.0)
        self._sums.append(
            torch.stack(
                ((mass * weights).sum(-1, dtype=torch.float64), mass.sum(-1, dtype=torch.float64))
            )
        )

    def balanced(self, weights: Tensor, advantages: Tensor) -> Tensor:
        """``weights [N]`` times the factor of the sign of ``advantages [N]``."""
        positive, negative = self.factors.to(weights.dtype)
        one = torch.ones_like(positive)
        return weights * torch.where(
            advantages > 0, positive, torch.where(advantages < 0, negative, one)
        )

    def step(self) -> None:
        """Take over the ratio of the tokens added; without both signs among them nothing is scaled.

        Collective.
        """
        sums = torch.stack(self._sums).sum(0) if self._sums else self.factors.new_zeros(2, 2)
        kept, mass = collectives.sum_(sums, self._groups)
        share = kept / mass
        factors = (share.flip(0) / share).clamp(max=1)
        known = (kept > 0).all() & factors.isfinite().all()
        self.factors = torch.where(known, factors, 1.0)
        self.discard()

    def state(self) -> dict[str, float]:
        """Waits for the device."""
        positive, negative = self.factors.tolist()
        return {"balance_positive": positive, "balance_negative": negative}

    def load(self, state: dict[str, float]) -> None:
        values = [state.get(name, 1.0) for name in ("balance_positive", "balance_negative")]
        self.factors = torch.tensor(values, device=self.factors.device, dtype=torch.float64)
