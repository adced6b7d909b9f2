# SPDX-License-Identifier: Apache-2.0
"""The weight of every token, from the verdict of the trust region and whatever adapts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capo_verl.config import CapoConfig, TargetRejection
from capo_verl.config.checks import is_number
from capo_verl.core import collectives
from capo_verl.core.adaptive_threshold import THRESHOLD_KEYS, AdaptiveThreshold, check_state
from capo_verl.core.rejection_guard import RejectionGuard
from capo_verl.core.soft_weights import soft_weights
from capo_verl.core.trust_region import fixed_policy_shift_max
from capo_verl.core.validation import shown

STATE_KEYS = (*THRESHOLD_KEYS, "filter_stopped", "rejection_streak")
RETIRED = ("policy_threshold", "balance_positive", "balance_negative")
"""Keys in the state of releases before 0.2 that mean nothing any more."""


class Weights(NamedTuple):
    """Weights of some tokens, ``[N]`` each."""

    trusted: Tensor
    """The verdict of the trust region: 0 or 1, or soft; 0 outside the mask."""
    applied: Tensor
    """The weights for the loss: 1 inside the mask if the filter only tracks or was stopped."""
    accepted: Tensor
    """bool, the tokens that stay in the mask of the loss."""


class Weighting:
    """The threshold and the guard, as far as the config asks for them.

    Args:
        groups: data- and context-parallel groups over which the tokens of a step are spread.
    """

    def __init__(
        self, config: CapoConfig, device: torch.device, groups: Sequence[collectives.Group]
    ):
        self._soft, self._tracks = config.weighting != "hard", config.mode == "track"
        self._config, self._device, tau = config, device, config.policy_shift_max
        self._rate: float | None = None
        self._threshold = (
            AdaptiveThreshold(tau, device, groups) if isinstance(tau, TargetRejection) else None
        )
        self._guard = (
            None
            if config.max_rejection is None
            else RejectionGuard(config.max_rejection, config.max_rejection_steps, device, groups)
        )

    @property
    def _adaptive(self) -> list[AdaptiveThreshold | RejectionGuard]:
        return [x for x in (self._threshold, self._guard) if x is not None]

    def policy_shift_max(self, learning_rate: float | None = None) -> float | Tensor | None:
        """tau_F at a learning rate, by default that of the tokens added last; None or 0 = no
        test.
        """
        rate = self._rate if learning_rate is None else learning_rate
        if self._threshold is not None:
            return self._threshold.at(rate or 0.0)
        return fixed_policy_shift_max(self._config, rate or 0.0)

    @property
    def stopped(self) -> Tensor | None:
        """Scalar bool on the device: the guard has ended the filtering; None without a guard."""
        return None if self._guard is None else self._guard.stopped

    def weigh(
        self, policy_shift: Tensor, verdict: Tensor, mask: Tensor, learning_rate: float
    ) -> Weights:
        """Weights of some tokens.

        Args:
            policy_shift: ``[N]``, m_F; verdict, mask: ``[N]`` bool, inside the trust region and the
                mask.
            learning_rate: at which the shift was predicted.
        """
        if self._soft:
            tau = self.policy_shift_max(learning_rate)
            assert tau is not None  # checked by the config
            trusted = torch.where(mask, soft_weights(policy_shift, tau), 0.0)
        else:
            trusted = verdict.to(policy_shift.dtype)
        whole = mask.to(trusted.dtype)
        if self._tracks:
            return Weights(trusted, whole, mask)
        applied, accepted = trusted, mask if self._soft else verdict
        if self._guard is not None:
            applied = torch.where(self._guard.stopped, whole, trusted)
            accepted = accepted | (mask & self._guard.stopped)
        return Weights(trusted, applied, accepted)

    def add(
        self, policy_shift: Tensor, trusted: Tensor, mask: Tensor, learning_rate: float
    ) -> None:
        """Count some tokens of the step for what adapts: ``[N]`` each, as for :meth:`weigh` and of
        its result.
        """
        self._rate = learning_rate
        if self._threshold is not None:
            self._threshold.add(policy_shift, mask, learning_rate)
        if self._guard is not None:
            self._guard.add(trusted, mask)

    def step(self, comparable: Tensor | bool, dtype: torch.dtype) -> None:
        """The optimizer steps.

        Collective, does not wait for the device; arguments as ``AdaptiveThreshold.step``.
        """
        if self._threshold is not None:
            self._threshold.step(comparable, dtype)
        if self._guard is not None:
            self._guard.step()

    def discard(self) -> None:
        """Forget the tokens seen since the last step."""
        for part in self._adaptive:
            part.discard()

    def move(self, device: torch.device) -> None:
        self._device = device
        for part in self._adaptive:
            part.move(device)

    def metrics(self) -> dict[str, Tensor]:
        """Scalars on the device by name (docs/metrics.md); a threshold that adapts is infinite
        before it is known, and at a rate that moves nothing.
        """
        found = {}
        tau = self.policy_shift_max()
        if isinstance(tau, Tensor):
            found["capo/policy_threshold"] = tau
        elif tau and self._config.reference_lr is not None:
            found["capo/policy_threshold"] = torch.full((), tau, device=self._device)
        if self._guard is not None:
            found["capo/filter_stopped"] = self._guard.stopped
        return found

    def state(self) -> dict[str, float]:
        """State of the parts, for ``CapoFilter.adaptive_state``."""
        return {name: value for part in self._adaptive for name, value in part.state().items()}

    def check(self, state: dict[str, float]) -> None:
        """
        Raises:
            ValueError: unless this is a state of :meth:`state`, or of an earlier release.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"CAPO adaptive state: expected a dict, got {shown(state)}")
        for name, value in state.items():
            if name not in (*STATE_KEYS, *RETIRED):
                raise ValueError(
                    f"CAPO adaptive state: {name} is unknown; expected some of "
                    f"{', '.join(STATE_KEYS)}"
                )
            if not is_number(value) or value < 0:
                raise ValueError(
                    f"CAPO adaptive state: {name}={shown(value)} is not a finite number >= 0; it "
                    "is corrupt"
                )
        for name, most in (("filter_stopped", 1), ("rejection_streak", 2**53)):
            value = state.get(name, 0)
            if value > most or value != int(value):
                raise ValueError(
                    f"CAPO adaptive state: {name}={shown(value)} is not an integer in 0..{most}; "
                    "it is corrupt"
                )
        check_state(state)

    def load(self, state: dict[str, float]) -> None:
        """Take over a state, for ``CapoFilter.load_adaptive_state``.

        Raises:
            ValueError: as :meth:`check`; nothing is changed then.
        """
        self.check(state)
        for part in self._adaptive:
            part.load(state)
