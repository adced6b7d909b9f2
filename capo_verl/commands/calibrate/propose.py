# SPDX-License-Identifier: Apache-2.0
"""Settings from measured steps: tau_F, tau_H, and a KL budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from capo_verl.commands.calibrate.step import StepMeasurement
from capo_verl.config import KLBudgetConfig

DELTA = KLBudgetConfig().delta
"""The KL budget of a step of 32 completions (docs/interventions.md)."""
KNOBS = "actor_rollout_ref.actor.policy_loss.capo"


@dataclass(frozen=True)
class Proposal:
    """Settings for one model, data set and learning rate, and what they would have done in the
    steps measured.
    """

    policy_shift_max: float
    """tau_F: the quantile of m_F that rejects ``rejection`` of the tokens."""
    objective_shift_max: float
    """tau_H: likewise of abs(m_H)."""
    rejection: float
    """Share asked for, of each test."""
    rejected: float
    """Share that the two together reject."""
    kl: float
    """Mean token KL of a step now, nats (median over steps)."""
    delta: float
    """KL budget."""
    scale: float
    """Factor by which the budget would multiply the learning rate: ``sqrt(delta / kl)``."""
    steps: int
    """Steps it is taken from."""


def steady(steps: Sequence[StepMeasurement]) -> Sequence[StepMeasurement]:
    """Without the first step, if there are more: before the first update of its moments m_F is that
    of plain gradient ascent.
    """
    return steps[1:] if len(steps) > 1 else steps


def propose(
    steps: Sequence[StepMeasurement], rejection: float = 0.02, depth: str = "all"
) -> Proposal:
    """
    Args:
        steps: of one run, in order.
        rejection: share of the tokens that each threshold should reject.

    Raises:
        ValueError: if there are no steps, or ``rejection`` is not in (0, 1).
    """
    if not 0 < rejection < 1:
        raise ValueError(f"--rejection {rejection}: expected a share in (0, 1)")
    if not steps:
        raise ValueError("no step was measured")
    used = steady(steps)
    policy = np.concatenate([s.tokens["policy_shift"] for s in used])
    objective = np.abs(np.concatenate([s.tokens["objective_shift"] for s in used]))
    tau_f, tau_h = (round_up(float(np.quantile(x, 1 - rejection))) for x in (policy, objective))
    kl = float(np.median([s.batch[f"kl_token_mean/{depth}"] for s in used]))
    return Proposal(
        policy_shift_max=tau_f,
        objective_shift_max=tau_h,
        rejection=rejection,
        rejected=float(np.mean((policy >= tau_f) | (objective >= tau_h))),
        kl=kl,
        delta=DELTA,
        scale=math.sqrt(DELTA / kl) if kl > 0 else 1.0,
        steps=len(used),
    )


def round_up(x: float, digits: int = 2) -> float:
    """The next number of so many significant digits that is not below x; 0 stays."""
    if x <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(x)) - digits + 1)
    return float(f"{math.ceil(x / unit * (1 - 1e-12)) * unit:.{digits - 1}e}")


def overrides(proposal: Proposal) -> dict[str, str]:
    """Purpose -> arguments of verl's ``main_ppo``."""
    filtered = (
        f"+capo=grpo {KNOBS}.policy_shift_max={_plain(proposal.policy_shift_max)} "
        f"{KNOBS}.objective_shift_max={_plain(proposal.objective_shift_max)}"
    )
    following = f"+capo=grpo '{KNOBS}.policy_shift_max={{target_rejection: {proposal.rejection}}}'"
    return {
        "token filter at fixed thresholds": filtered,
        "token filter that keeps its rejection rate": following,
        "learning rate by a KL budget": "+capo=kl_budget "
        f"{KNOBS}.kl_budget.delta={_plain(proposal.delta)}",
    }


def _plain(x: float) -> str:
    return "null" if x == 0 else f"{x:.2g}"
