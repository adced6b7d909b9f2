# SPDX-License-Identifier: Apache-2.0
"""The learning rate whose step causes a given KL divergence, found from measured ones.

Plain arithmetic on the host, once per optimizer step: every rank that is told the same numbers
comes to the same rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from capo_verl.config import KLBudgetConfig
from capo_verl.config.checks import is_number
from capo_verl.core.validation import shown

FIRST_RATE = 1e-7
"""Rate of a run's first step, if the user's is not within ten times of it: what is measured after
it is the rounding of the model's activations, in whatever precision they are.
"""
GROWTH = 10.0
"""Largest factor between the rates of two steps."""
RESOLVED = 3.0
"""A KL of so many times the floor tells of the step."""
SEARCHED = 8.0
"""While none has been resolved, the rate grows towards a KL of so many times the floor."""
COMPLETIONS, MOST_COMPLETIONS = 32, 128
"""Of the step for which ``delta`` is given, and up to which it is proportional to them: beyond, no
study looked. Under Adam a rate that grows with the root of the batch has a KL that grows with it.
"""
LARGEST_KL = 1.0
"""Nats; what is above it (infinity) is far from where KL is quadratic, and counts as this."""
SMALLEST_KL = 1e-14
"""Nats; what is below it is the rounding of float32."""
STEPS_BACK = 3
"""Bound on the number of times a step is shortened, with a forward pass each: far from the old
policy KL is not quadratic in the step.
"""
KEPT_BYTES = 256 * 2**20
"""The old policy's logits of the tokens that are measured are at most so large on a rank."""
STATE = ("curvature", "measured", "floor", "rate")


def decay(progress: float, final_share: float) -> float:
    """Half a cosine from 1 at ``progress`` 0 to ``final_share`` at 1."""
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))


class KLBudget:
    """``kappa += max(eta, 1/t) (KL / a^2 - kappa)``, then ``a = sqrt(delta_t / kappa)``.

    Once per optimizer step: step at the rate of :meth:`begin_step`, measure, ``end_step(kl)``. The
    average is arithmetic, because the KLs of mini-batches are heavy-tailed: a geometric one would
    hold the typical KL at the budget and let the mean run several times higher.

    A run's first step is made at :data:`FIRST_RATE`: its KL is the floor of what can be measured,
    and is taken off every later one. From there the rate grows at most :data:`GROWTH` times a step.
    A KL below :data:`RESOLVED` floors is left out, unless the budget itself is above the floor and
    ``kappa`` is known.

    Args:
        config: the knobs.

    Attributes:
        curvature: ``kappa``, nats per squared learning rate; None before the first measurement.
        measured: number of measurements in it.
        floor: nats; None before the first step.
        rate: of the last measured step; None before the first.
        rate_now: of the step begun last.
        delta: budget of the step begun last, nats.
    """

    def __init__(self, config: KLBudgetConfig):
        self.config = config
        self.curvature: float | None = None
        self.measured = 0
        self.floor: float | None = None
        self.rate: float | None = None
        self.delta = config.delta
        self.rate_now = 0.0

    def begin_step(
        self, scheduled: float, peak: float, progress: float = 0.0, completions: int = COMPLETIONS
    ) -> float:
        """The learning rate of the coming optimizer step.

        Args:
            scheduled: what the scheduler says for it, >= 0; 0 (the start of a warm-up) stays 0.
            peak: the user's learning rate, which the scheduler starts from.
            progress: part of the run that is over, in 0..1.
            completions: in the step, over all ranks.
        """
        warm = scheduled / peak
        batch = min(completions, MOST_COMPLETIONS) / COMPLETIONS
        left = decay(progress, self.config.final_share)
        self.delta = self.config.delta * batch * warm * warm * left
        self.rate_now = 0.0
        if scheduled:
            least, most = self.config.rate_min, self.config.rate_max
            rate = self._wanted(scheduled, peak)
            if self.rate is not None:  # the first step is short whatever the limits are
                rate = max(least * scheduled, rate)
            self.rate_now = rate if most is None else min(most * scheduled, rate)
        return self.rate_now

    def _wanted(self, scheduled: float, peak: float) -> float:
        if self.rate is None:
            return min(FIRST_RATE, peak / GROWTH)
        if self.curvature is not None:
            return min(GROWTH * self.rate, math.sqrt(self.delta / self.curvature))
        if self.floor is None:  # nothing has moved yet: no reason to pass the user's rate
            return min(GROWTH * self.rate, scheduled)
        # The step made was not resolved: its own part was less than (RESOLVED - 1) floors.
        known = (RESOLVED - 1) * self.floor
        return self.rate * min(GROWTH, math.sqrt(max(self.delta, SEARCHED * self.floor) / known))

    def end_step(self, kl: float | None) -> None:
        """Learn from a step that was made at :meth:`begin_step`'s rate.

        Args:
            kl: mean KL per token which it caused, before any step back (nats). None (nothing was
                measured), or a step at rate 0, changes nothing.

        Raises:
            ValueError: if ``kl`` is NaN or no number; nothing has changed then.
        """
        if kl is None:
            return
        if not (is_number(kl) or isinstance(kl, float)):
            raise ValueError(f"kl={shown(kl)}: expected a number, or None")
        if math.isnan(kl):
            raise ValueError(
                "kl is NaN: the policy's logits are not numbers; resume from the last checkpoint"
            )
        if self.rate_now == 0:
            return
        self.rate = self.rate_now
        if kl < SMALLEST_KL:
            return
        if self.floor is None:
            self.floor = min(kl, LARGEST_KL)
            return
        if self.resolves(kl):
            self.measured += 1
            found = max(0.0, min(kl, LARGEST_KL) - self.floor) / self.rate**2
            old = self.curvature or 0.0
            self.curvature = old + max(self.config.eta, 1 / self.measured) * (found - old)

    def resolves(self, kl: float) -> bool:
        """True if a KL measured now tells more of the step than of rounding."""
        floor = self.floor or 0.0
        return kl >= RESOLVED * floor or (self.curvature is not None and self.delta >= floor)

    def needs_line_search(self, kl: float) -> float | None:
        """The share of a step with this KL to keep, ``sqrt(delta_t / KL)``.

        None if it may stay: KL <= ``line_search * delta_t``, or ``line_search`` is None.
        """
        if self.config.line_search is None or not kl > self.config.line_search * self.delta:
            return None
        return math.sqrt(self.delta / kl)

    def state_dict(self) -> dict[str, float | None]:
        """``curvature``, ``measured``, ``floor`` and ``rate``."""
        return {name: getattr(self, name) for name in STATE}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: naming the key and the value, if it is not a state of :meth:`state_dict`.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"kl_budget state: expected a dict, got {shown(state)}")
        if is_scale(state):
            _check_scale(state)
            return
        keys = sorted(map(str, state))
        if keys != sorted(STATE):
            raise ValueError(
                f"kl_budget state: expected the keys {', '.join(STATE)}, got "
                f"{', '.join(keys) or 'none'}"
            )
        for name, value in state.items():
            if name == "measured":
                if not is_number(value) or value != int(value) or value < 0:
                    raise ValueError(
                        f"kl_budget state: measured={shown(value)}, expected an integer >= 0"
                    )
            elif value is not None and (not is_number(value) or value <= 0):
                raise ValueError(
                    f"kl_budget state: {name}={shown(value)}, expected a positive number, or null"
                )
        if (state["curvature"] is None) != (state["measured"] == 0):
            raise ValueError(
                f"kl_budget state: curvature={shown(state['curvature'])} of "
                f"measured={shown(state['measured'])} measurements contradict each other"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of :meth:`state_dict`.

        That of a release before 0.2, the scale of a learning rate, says nothing of the curvature:
        the rate is found anew.

        Raises:
            ValueError: as :meth:`check_state_dict`; nothing has changed then.
        """
        self.check_state_dict(state)
        if not is_scale(state):
            for name in STATE:
                setattr(self, name, state[name])
            self.measured = int(self.measured)


def is_scale(state: Mapping[str, Any]) -> bool:
    """True for a state of a release before 0.2."""
    return set(state) in ({"scale"}, {"scale", "calibration"})


def _check_scale(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        if not is_number(value) or value <= 0:
            raise ValueError(f"kl_budget state: {name}={shown(value)}, expected a positive number")
    if state["scale"] > 1:
        raise ValueError(f"kl_budget state: scale={shown(state['scale'])}, expected at most 1")
