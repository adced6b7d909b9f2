# SPDX-License-Identifier: Apache-2.0
"""Knobs of the KL-budget control of the learning rate, ``capo.kl_budget``.

Pure Python, like :mod:`capo_verl.config`.
"""

from __future__ import annotations

from dataclasses import dataclass

from capo_verl.config.checks import between, number, one_of

ESTIMATORS = ("exact", "k3")


@dataclass(frozen=True)
class KLBudgetConfig:
    """The budget of one optimizer step, and how its KL is measured.

    After each step the mean token KL(old || new) on a share of its batch moves the scale ``s`` of
    the learning rate: ``log s += eta * clip(log(delta / KL) / 2, -1, 1)``, ``scale_min <= s <= 1``.

    Raises:
        ValueError: naming the knob, the value found and what is allowed.
    """

    delta: float = 3e-4
    """The budget: mean KL divergence of a response token's distribution that one optimizer step
    should cause (nats).
    """
    eta: float = 0.2
    """Speed at which the scale follows, in (0, 1]."""
    scale_min: float = 1e-3
    """Floor of the scale, in (0, 1]."""
    probe_share: float = 0.125
    """Share of the mini-batch's samples on which the KL is measured, in (0, 1]; at least one per
    data-parallel rank.
    """
    estimator: str = "exact"
    """``exact``: over the whole vocabulary.

    ``k3``: from the taken tokens' log-probabilities, exp(r) - 1 - r (Schulman 2020).
    """
    line_search: float | None = None
    """Steps back if a step's KL exceeds ``line_search * delta``, to where it would meet ``delta``.
    Costs a copy of the parameters this rank optimises. None = off.
    """

    def __post_init__(self) -> None:
        one_of("kl_budget.estimator", self.estimator, ESTIMATORS)
        number("kl_budget.delta", self.delta)
        if self.delta <= 0:
            raise ValueError(
                f"capo.kl_budget.delta={self.delta!r}: must be > 0 (nats per token and step)"
            )
        for name in ("eta", "scale_min", "probe_share"):
            between(f"kl_budget.{name}", getattr(self, name), 0, 1, low_open=True)
        if self.line_search is not None:
            number("kl_budget.line_search", self.line_search)
            if self.line_search < 1:
                raise ValueError(
                    f"capo.kl_budget.line_search={self.line_search!r}: expected a factor >= 1, or "
                    "null"
                )
