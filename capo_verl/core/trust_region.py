# SPDX-License-Identifier: Apache-2.0
"""The accept rule: ``low < m_H < tau_H`` and ``m_F < tau_F``, each test switched off by a threshold
of None or 0.

A threshold that is meant for a learning rate follows the rate of the step, as the shifts do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capo_verl.config import CapoConfig, TargetRejection
from capo_verl.core.curvature import Shifts

NO_STEP = 1e-16
"""A learning rate that moves nothing: m_F at it, and at smaller ones, has no digits in float32."""


class Verdict(NamedTuple):
    """The verdicts of the two tests, each of the shape of the shifts."""

    objective_ok: Tensor
    policy_ok: Tensor

    @property
    def accepted(self) -> Tensor:
        return self.objective_ok & self.policy_ok


def relative_rate(config: CapoConfig, learning_rate: float) -> float:
    """``learning_rate / reference_lr``: m_F is proportional to its square, the first term of m_H to
    itself.

    1 without a ``reference_lr``, and at a rate that moves nothing.
    """
    if config.reference_lr is None or learning_rate <= NO_STEP:
        return 1.0
    return learning_rate / config.reference_lr


def fixed_policy_shift_max(config: CapoConfig, learning_rate: float) -> float | None:
    """tau_F at a learning rate, if it does not adapt."""
    tau = config.policy_shift_max
    assert not isinstance(tau, TargetRejection)
    relative = relative_rate(config, learning_rate)
    return None if tau is None else tau * relative * relative


def judge(
    config: CapoConfig,
    shifts: Shifts,
    policy_shift_max: float | Tensor | None,
    learning_rate: float,
) -> Verdict:
    """Apply the trust region to shifts of any shape. Comparisons are strict, except a numeric lower
    bound (>=).

    A NaN fails every test that is switched on.

    Args:
        policy_shift_max: tau_F at this learning rate, a scalar on the device if it adapts; None or
            0 = no test.
        learning_rate: at which the shifts were predicted.
    """
    objective, policy = shifts
    objective_ok, policy_ok = (
        torch.ones_like(objective, dtype=torch.bool),
        torch.ones_like(policy, dtype=torch.bool),
    )
    relative = relative_rate(config, learning_rate)
    if config.objective_shift_max:
        objective_ok &= objective < config.objective_shift_max * relative
        if config.objective_shift_min == "symmetric":
            objective_ok &= objective > -config.objective_shift_max * relative
    if isinstance(config.objective_shift_min, int | float):
        objective_ok &= objective >= config.objective_shift_min * relative
    if isinstance(policy_shift_max, Tensor) or policy_shift_max:
        policy_ok &= policy < policy_shift_max
    return Verdict(objective_ok, policy_ok)
