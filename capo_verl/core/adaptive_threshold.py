# SPDX-License-Identifier: Apache-2.0
"""A threshold of m_F that sets itself, so that a given share ``r`` of the tokens lies above it.

m_F is proportional to the square of the learning rate ``a``, so ``x = m_F / a^2`` is what is
followed: warm-up, decay and a rate that a KL budget sets change nothing. After step ``t``, over all
ranks,

    q_t = (1 - r) quantile of x, exact          above_t = share of the tokens with m_F >= tau_F
    log q   <- log q + max(1 - memory, 1/t) (log q_t - log q)
    log c   <- log c + GAIN (min(above_t / r, MOST) - 1)
    tau_F    = c q a^2

``q`` follows the scale. ``c`` takes off what is left: a mean of quantiles lags behind a drift, and
of heavy-tailed shares it is not the quantile of the mean share.

It starts with the quantile of the first step that can be compared with later ones; until then
nothing is above it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from capo_verl.config import TargetRejection
from capo_verl.core import collectives
from capo_verl.core.order_statistics import nearest_rank, ordered_keys
from capo_verl.core.trust_region import NO_STEP

GAIN, MOST = 0.2, 10.0
"""Of the correction, and the largest share above the threshold, in targets, that it believes."""
THRESHOLD_KEYS = ("threshold_quantile", "threshold_correction", "threshold_steps")
"""Keys of the state: ``q``, ``c`` and ``t``."""


class AdaptiveThreshold:
    """tau_F of ``{target_rejection: ...}``.

    Args:
        target: the share to reject and the memory.
        groups: groups over which the tokens of a step are spread.
    """

    def __init__(
        self, target: TargetRejection, device: torch.device, groups: Sequence[collectives.Group]
    ):
        self._target, self._groups = target, groups
        self._quantile, self._correction = torch.ones(2, device=device, dtype=torch.float64)
        self._steps = torch.zeros((), device=device, dtype=torch.int64)
        self.discard()

    def at(self, learning_rate: float) -> Tensor:
        """tau_F at a learning rate: scalar float64 on the device.

        Infinity before the first quantile, and at a rate that moves nothing.
        """
        per_squared_rate = self._per_squared_rate()
        if learning_rate <= NO_STEP:
            return torch.full_like(per_squared_rate, torch.inf)
        return per_squared_rate * learning_rate**2

    def _per_squared_rate(self) -> Tensor:
        return torch.where(self._steps > 0, self._quantile * self._correction, torch.inf)

    def discard(self) -> None:
        """Forget the tokens seen since the last step."""
        self._shifts: list[Tensor] = []
        self._masks: list[Tensor] = []

    def move(self, device: torch.device) -> None:
        self._quantile, self._correction = self._quantile.to(device), self._correction.to(device)
        self._steps = self._steps.to(device)

    def add(self, policy_shift: Tensor, mask: Tensor, learning_rate: float) -> None:
        """Some of the step's tokens: ``policy_shift [N]`` at a learning rate, those in ``mask [N]``
        bool.

        At a rate that moves nothing there is nothing to learn from. Does not wait for the device.
        """
        if learning_rate > NO_STEP:
            self._shifts.append(policy_shift / learning_rate**2)
            self._masks.append(mask)

    def step(self, comparable: Tensor | bool, dtype: torch.dtype) -> None:
        """Learn from the tokens added. Collective; does not wait for the device.

        Args:
            comparable: False if this step's m_F is not on the scale of later ones; then nothing
                moves.
            dtype: of the shifts, the same on all ranks.
        """
        device, share = self._quantile.device, self._target.target_rejection
        # Joined before their bits are looked at: micro-batches may differ in dtype.
        shifts = torch.cat([torch.empty(0, device=device, dtype=dtype), *self._shifts])
        mask = torch.cat([torch.empty(0, device=device, dtype=torch.bool), *self._masks])
        above = mask & (shifts >= self._per_squared_rate())
        count, above = collectives.sum_(torch.stack((mask.sum(), above.sum())), self._groups)
        found = nearest_rank(ordered_keys(shifts, mask)[None], count, (1 - share,), self._groups)[
            0, 0
        ].double()
        # A quantile of 0 (no advantage anywhere) has no logarithm, and would reject everything ever
        # after.
        known = (found > 0) & found.isfinite() & comparable
        steps = self._steps + 1
        weight = (1 / steps.double()).clamp(min=1 - self._target.memory)
        excess = (above.double() / count / share).clamp(max=MOST) - 1
        quantile = self._quantile * (found / self._quantile) ** weight
        correction = torch.where(
            self._steps > 0, self._correction * (GAIN * excess).exp(), self._correction
        )
        self._quantile = torch.where(known, quantile, self._quantile)
        self._correction = torch.where(known, correction, self._correction)
        self._steps = torch.where(known, steps, self._steps)
        self.discard()

    def state(self) -> dict[str, float]:
        """Empty before the first quantile. Waits for the device."""
        if not int(self._steps):
            return {}
        values = (self._quantile, self._correction, self._steps)
        return {name: float(x) for name, x in zip(THRESHOLD_KEYS, values, strict=True)}

    def load(self, state: Mapping[str, float]) -> None:
        quantile, correction, steps = (state.get(name) for name in THRESHOLD_KEYS)
        self._quantile = torch.full_like(self._quantile, quantile or 1.0)
        self._correction = torch.full_like(self._correction, correction or 1.0)
        self._steps = torch.full_like(self._steps, int(steps or 0))


def check_state(state: Mapping[str, float]) -> None:
    """
    Args:
        state: of numbers >= 0.

    Raises:
        ValueError: unless its entries of this threshold are those of
            :meth:`AdaptiveThreshold.state`.
    """
    found = [name for name in THRESHOLD_KEYS if name in state]
    if not found:
        return
    if missing := [name for name in THRESHOLD_KEYS if name not in state]:
        raise ValueError(
            f"CAPO adaptive state: {found[0]} without {missing[0]}; the three of a threshold "
            "belong together"
        )
    quantile, correction, steps = (float(state[name]) for name in THRESHOLD_KEYS)
    if steps != int(steps) or not 1 <= steps <= 2**53:
        raise ValueError(
            f"CAPO adaptive state: threshold_steps={steps:g} is not an integer in 1..{2**53}; it "
            "is corrupt"
        )
    # The shifts that it is compared with are float32.
    each = torch.tensor((quantile, correction, quantile * correction), dtype=torch.float32)
    if not bool(((each > 0) & each.isfinite()).all()):
        raise ValueError(
            f"CAPO adaptive state: threshold_quantile={quantile:g} and "
            f"threshold_correction={correction:g} would reject every token or none; they are "
            "corrupt"
        )
