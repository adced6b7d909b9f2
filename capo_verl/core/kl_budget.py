# SPDX-License-Identifier: Apache-2.0
"""A controller that keeps the KL divergence of an optimizer step near a budget, by scaling the
learning rate.

Plain arithmetic on the host, once per optimizer step: every rank that is told the same numbers
comes to the same scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from capo_verl.config import KLBudgetConfig
from capo_verl.config.checks import is_number
from capo_verl.core.validation import shown

STEPS_BACK = 3
"""Bound on the number of times a step is shortened, with a forward pass each: far from the old
policy KL is not quadratic in the step.
"""
RETIRED = {"calibration"}
"""Keys in the state of releases before 0.2 that mean nothing any more."""


class KLBudget:
    """``log s += eta * clip(log(delta / KL) / 2, -1, 1)``, ``scale_min <= s <= 1``.

    KL is proportional to the squared step, hence the half. Once per optimizer step: step at
    ``begin_step()`` times the learning rate, measure, ``end_step(kl)``.

    Args:
        config: the knobs.

    Attributes:
        scale: ``s``.
    """

    def __init__(self, config: KLBudgetConfig):
        self.config = config
        self.scale = 1.0

    def begin_step(self) -> float:
        """The factor of the learning rate for the coming optimizer step, in ``scale_min..1``."""
        return self.scale

    def end_step(self, kl: float | None) -> None:
        """Learn from a step that was made at :meth:`begin_step`'s factor.

        Args:
            kl: mean KL per token which it caused, before any step back (nats). 0 raises the scale
                by ``eta`` (in log), as every KL far below the budget does. None (nothing was
                measured) or a negative number (rounding) changes nothing.

        Raises:
            ValueError: if ``kl`` is NaN or no number; nothing has changed then.
        """
        if kl is None:
            return
        if not (is_number(kl) or isinstance(kl, float)):
            raise ValueError(f"kl={shown(kl)}: expected a number, or None")
        if kl < 0:
            return
        if math.isnan(kl):
            raise ValueError(
                "kl is NaN: the policy's logits are not numbers; resume from the last checkpoint"
            )
        move = (
            1.0 if kl == 0 else min(1.0, max(-1.0, 0.5 * (math.log(self.config.delta) - _log(kl))))
        )
        scale = math.exp(math.log(self.scale) + self.config.eta * move)
        self.scale = min(1.0, max(self.config.scale_min, scale))

    def needs_line_search(self, kl: float) -> float | None:
        """The share of a step with this KL to keep, ``sqrt(delta / KL)``.

        None if it may stay: KL <= ``line_search * delta``, or ``line_search`` is None.
        """
        if self.config.line_search is None or not kl > self.config.line_search * self.config.delta:
            return None
        return math.sqrt(self.config.delta / kl)

    def state_dict(self) -> dict[str, float]:
        """``{"scale": s}``."""
        return {"scale": self.scale}

    def check_state_dict(self, state: dict[str, float]) -> None:
        """
        Raises:
            ValueError: naming the key and the value, if it is not a state of :meth:`state_dict`.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"kl_budget state: expected a dict, got {shown(state)}")
        keys = sorted(str(key) for key in set(state) - RETIRED)
        if keys != ["scale"]:
            raise ValueError(
                f"kl_budget state: expected the key scale, got {', '.join(keys) or 'none'}"
            )
        for name, value in state.items():
            if not is_number(value) or value <= 0:
                raise ValueError(
                    f"kl_budget state: {name}={shown(value)}, expected a positive number"
                )
        if state["scale"] > 1:
            raise ValueError(f"kl_budget state: scale={shown(state['scale'])}, expected at most 1")

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over the state of :meth:`state_dict`.

        A scale below this run's ``scale_min`` is raised to it.

        Raises:
            ValueError: as :meth:`check_state_dict`; nothing has changed then.
        """
        self.check_state_dict(state)
        self.scale = max(self.config.scale_min, float(state["scale"]))


def _log(x: float) -> float:
    return math.inf if x == math.inf else math.log(x)
