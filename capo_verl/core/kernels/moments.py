# SPDX-License-Identifier: Apache-2.0
"""The state of the adam model, as the kernels get it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Moments(NamedTuple):
    """Row-wise first and second moments of the LM head's policy gradient: this rank's rows."""

    exp_avg: Tensor
    """``[rows, H]``, M."""
    exp_avg_sq: Tensor
    """``[rows, H]``, Q."""
    steps: Tensor
    """Scalar int64 on the device, n: the number of updates so far. While it is 0, P(g) = g."""
    betas: tuple[float, float]
    eps: float
    first_row: int
    """Global id of the first row."""

    def corrected(self, n: Any) -> tuple[Any, Any, Any, Any]:
        """Factors of M, g, Q and g^2 in the bias-corrected moments after update number ``n`` (from
        1; int or float64 scalar).

        ``P(g) = (c0 M + c1 g) / (sqrt(c2 Q + c3 g^2) + eps)``
        """
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**n, 1 - beta2**n
        return (
            beta1 / correction1,
            (1 - beta1) / correction1,
            beta2 / correction2,
            (1 - beta2) / correction2,
        )
