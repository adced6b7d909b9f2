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

    The mean token KL(old || new) that a step of learning rate ``a`` causes is ``kappa a^2``. Each
    step measures it; ``kappa`` is averaged; the next step is made at ``a = sqrt(delta_t / kappa)``,
    with ``delta_t = delta min(B, 128) / 32 w^2 (final_share + (1 - final_share) (1 + cos(pi x)) /
    2)``: ``B`` completions in the step, ``w`` the scheduler's factor (warm-up), ``x`` the part of
    the run that is over.

    Raises:
        ValueError: naming the knob, the value found and what is allowed.
    """

    delta: float = 2e-3
    """The budget: mean KL divergence of a response token's distribution that one optimizer step of
    32 completions should cause (nats), before it decays. Proportional to the completions, up to
    128.
    """
    final_share: float = 0.1
    """Share of ``delta`` left at the end of the run, along half a cosine, in (0, 1]; 1 = constant.
    Constant also where ``optim.total_training_steps`` is not known.
    """
    eta: float = 0.2
    """Weight of a measurement in the average of ``kappa``, in (0, 1]; of the first ones 1/t."""
    rate_min: float = 0.0
    """Least learning rate after a run's first step, in multiples of the scheduled one, >= 0."""
    rate_max: float | None = None
    """Largest learning rate, in multiples of the scheduled one. 1: the budget only slows down.
    None = no limit.
    """
    probe_share: float = 0.0625
    """Share of the mini-batch's samples on which the KL is measured, in (0, 1]; at least one per
    data-parallel rank.
    """
    estimator: str = "exact"
    """``exact``: over the whole vocabulary.

    ``k3``: from the taken tokens' log-probabilities, exp(r) - 1 - r (Schulman 2020).
    """
    line_search: float | None = None
    """Steps back if a step's KL exceeds ``line_search * delta_t``, to where it would meet
    ``delta_t``. Costs a copy of the parameters this rank optimises. None = off.
    """

    def __post_init__(self) -> None:
        one_of("kl_budget.estimator", self.estimator, ESTIMATORS)
        number("kl_budget.delta", self.delta)
        if not 0 < self.delta <= 1:
            raise ValueError(
                f"capo.kl_budget.delta={self.delta!r}: must be > 0 and at most 1 (nats per token "
                "and step); to measure only, set rate_min=1 and rate_max=1"
            )
        for name in ("eta", "final_share", "probe_share"):
            between(f"kl_budget.{name}", getattr(self, name), 0, 1, low_open=True)
        number("kl_budget.rate_min", self.rate_min)
        if self.rate_min < 0:
            raise ValueError(f"capo.kl_budget.rate_min={self.rate_min!r}: must be >= 0")
        if self.rate_max is not None:
            number("kl_budget.rate_max", self.rate_max)
            if self.rate_max <= 0 or self.rate_max < self.rate_min:
                raise ValueError(
                    f"capo.kl_budget.rate_max={self.rate_max!r}: expected a multiple > 0, not "
                    f"below rate_min={self.rate_min!r}, or null"
                )
        if self.line_search is not None:
            number("kl_budget.line_search", self.line_search)
            if self.line_search < 1:
                raise ValueError(
                    f"capo.kl_budget.line_search={self.line_search!r}: expected a factor >= 1, or "
                    "null"
                )
