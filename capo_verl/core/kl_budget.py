# SPDX-License-Identifier: Apache-2.0
"""A controller that keeps the KL divergence of an optimizer step near a budget, by scaling the
learning rate.

Plain arithmetic on the host, once per optimizer step: every rank that is told the same numbers
comes to the same scale.
"""

from __future__ import annotations

import math

from capo_verl.config import KLBudgetConfig

CALIBRATION_MEMORY = 0.9
"""How much of the old calibration's logarithm a step keeps."""

STEPS_BACK = 3
"""How often a step is shortened at most, with a forward pass each: far from the old policy KL is
not quadratic in the step.
"""


class KLBudget:
    """``log s += eta * clip(log(delta / KL) / 2, -1, 1)``, ``scale_min <= s <= 1``; KL is
    proportional to the squared step, hence the half.

    With a predictor, the coming step is bounded as well: ``calibration`` is the running log-average
    of the measured KL over ``predicted * factor^2``, and the factor is at most ``sqrt(delta /
    (calibration * predicted))``. A bound never moves ``s``.

    Use, once per optimizer step: ``factor = begin_step(predicted)``, step at ``factor`` times the
    learning rate, measure, ``end_step(kl)``.

    Args:
        config: the knobs.

    Attributes:
        scale: ``s``.
        calibration: measured over predicted KL; None until there was a step with both.
    """

    def __init__(self, config: KLBudgetConfig):
        self.config = config
        self.scale = 1.0
        self.calibration: float | None = None
        self._begun: tuple[float | None, float] | None = None

    def begin_step(self, predicted: float | None = None) -> float:
        """The factor of the learning rate for the coming optimizer step, in ``scale_min..1``.

        Args:
            predicted: KL which a curvature model expects of a step at the unscaled learning rate,
                in any unit: it is calibrated. None, or a number that is not positive and finite: no
                bound in this step. Not read with ``predictor`` none or constant.
        """
        if self.config.predictor == "none":
            predicted = None
        elif self.config.predictor == "constant":
            predicted = 1.0
        if predicted is not None and not 0 < predicted < math.inf:
            predicted = None
        factor = self.scale
        if predicted is not None and self.calibration is not None:
            # Square roots one by one: the product may underflow.
            bound = math.sqrt(self.config.delta) / (
                math.sqrt(self.calibration) * math.sqrt(predicted)
            )
            factor = min(factor, bound)
        factor = min(1.0, max(self.config.scale_min, factor))
        self._begun = predicted, factor
        return factor

    def end_step(self, kl: float | None) -> None:
        """Learn from the step since :meth:`begin_step`; without one, as if it had been made at
        ``scale`` and nothing predicted.

        Args:
            kl: mean KL per token which it caused, before any step back (nats). 0 raises the scale
                by ``eta`` (in log), as every KL far below the budget does. None (nothing was
                measured) or a negative number (rounding) changes nothing.

        Raises:
            ValueError: if ``kl`` is NaN; nothing has changed then.
        """
        predicted, factor = self._begun or (None, self.scale)
        if kl is None or kl < 0:
            self._begun = None
            return
        if math.isnan(kl):
            raise ValueError(
                "kl is NaN: the policy's logits are not numbers; resume from the last checkpoint"
            )
        self._begun = None
        move = (
            1.0 if kl == 0 else min(1.0, max(-1.0, 0.5 * (math.log(self.config.delta) - _log(kl))))
        )
        scale = math.exp(math.log(self.scale) + self.config.eta * move)
        self.scale = min(1.0, max(self.config.scale_min, scale))
        if predicted is not None and 0 < kl < math.inf:
            ratio = math.log(kl) - math.log(predicted) - 2 * math.log(factor)
            if self.calibration is not None:
                ratio = (
                    CALIBRATION_MEMORY * math.log(self.calibration)
                    + (1 - CALIBRATION_MEMORY) * ratio
                )
            self.calibration = math.exp(min(700.0, max(-700.0, ratio)))

    def cancel_step(self) -> None:
        """The step since :meth:`begin_step` was not made."""
        self._begun = None

    def needs_line_search(self, kl: float) -> float | None:
        """Which share of a step with this KL to keep, ``sqrt(delta / KL)``; None if it may stay: KL
        <= ``line_search * delta``, or ``line_search`` is None.
        """
        if self.config.line_search is None or not kl > self.config.line_search * self.config.delta:
            return None
        return math.sqrt(self.config.delta / kl)

    def state_dict(self) -> dict[str, float]:
        """``{"scale": s}``, and ``"calibration"`` once there is one."""
        return {"scale": self.scale} | (
            {} if self.calibration is None else {"calibration": self.calibration}
        )

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over the state of :meth:`state_dict`. A scale below this run's ``scale_min`` is
        raised to it.

        Raises:
            ValueError: naming the key and the value, if it is not such a state; nothing has changed
                then.
        """
        unknown = sorted(set(state) - {"scale", "calibration"})
        if unknown or "scale" not in state:
            raise ValueError(
                "kl_budget state: expected the keys scale and calibration, got "
                f"{', '.join(sorted(state)) or 'none'}"
            )
        for name, value in state.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 < value < math.inf
            ):
                raise ValueError(f"kl_budget state: {name}={value!r}, expected a positive number")
        if state["scale"] > 1:
            raise ValueError(f"kl_budget state: scale={state['scale']!r}, expected at most 1")
        self.scale = max(self.config.scale_min, float(state["scale"]))
        self.calibration = float(state["calibration"]) if "calibration" in state else None
        self._begun = None


def _log(x: float) -> float:
    return math.inf if x == math.inf else math.log(x)
