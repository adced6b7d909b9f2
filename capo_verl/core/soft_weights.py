# SPDX-License-Identifier: Apache-2.0
"""Weights in place of decisions: ``w = min(1, sqrt(tau_F / m_F))``.

m_F is quadratic in the gradient, so a token with weight w has the shift ``w^2 m_F <= tau_F``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_weights(policy_shift: Tensor, tau: float | Tensor) -> Tensor:
    """``min(1, sqrt(tau / m_F))``, of the shape and dtype of ``policy_shift``; 0 where that is
    NaN.
    """
    inside = policy_shift <= tau
    root = tau.to(policy_shift.dtype).sqrt() if isinstance(tau, Tensor) else math.sqrt(tau)
    return torch.where(inside, 1.0, root / policy_shift.sqrt()).nan_to_num(nan=0.0)
