# SPDX-License-Identifier: Apache-2.0
"""The accept rule: ``low < m_H < tau_H`` and ``m_F < tau_F``, each test switched off by a threshold
of None or 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.core.curvature import Shifts


class Verdict(NamedTuple):
    """The verdicts of the two tests, each of the shape of the shifts."""

    objective_ok: Tensor
    policy_ok: Tensor

    @property
    def accepted(self) -> Tensor:
        return self.objective_ok & self.policy_ok


def judge(config: CapoConfig, shifts: Shifts, policy_shift_max: float | Tensor | None) -> Verdict:
    """Apply the trust region to shifts of any shape. Comparisons are strict, except a numeric lower
    bound (>=).

    A NaN fails every test that is switched on.

    Args:
        policy_shift_max: tau_F of this step, a scalar on the device if it adapts; None or 0 = no
            test.
    """
    objective, policy = shifts
    objective_ok, policy_ok = (
        torch.ones_like(objective, dtype=torch.bool),
        torch.ones_like(policy, dtype=torch.bool),
    )
    if config.objective_shift_max:
        objective_ok &= objective < config.objective_shift_max
        if config.objective_shift_min == "symmetric":
            objective_ok &= objective > -config.objective_shift_max
    if isinstance(config.objective_shift_min, int | float):
        objective_ok &= objective >= config.objective_shift_min
    if isinstance(policy_shift_max, Tensor) or policy_shift_max:
        policy_ok &= policy < policy_shift_max
    return Verdict(objective_ok, policy_ok)
