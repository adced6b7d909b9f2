# SPDX-License-Identifier: Apache-2.0
"""A threshold of m_F that sets itself: the quantile above which a given share of the tokens lies,
in a running mean of its log.

    q_t = (1 - target) quantile of the step's m_F, exact, over all ranks
    log tau_{t+1} = memory * log tau_t + (1 - memory) * log q_t

It starts with the quantile of the first step that can be compared with later ones; until then
nothing is above it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from capo_verl.config import TargetRejection
from capo_verl.core import collectives
from capo_verl.core.order_statistics import nearest_rank, ordered_keys


class AdaptiveThreshold:
    """tau_F of ``{target_rejection: ...}``.

    Args:
        target: the share to reject and the memory.
        groups: groups over which the tokens of a step are spread.

    Attributes:
        value: scalar float64 on the device, infinity before the first quantile. A new tensor after
            every step.
    """

    def __init__(
        self, target: TargetRejection, device: torch.device, groups: Sequence[collectives.Group]
    ):
        self._target, self._groups = target, groups
        self.value = torch.full((), torch.inf, device=device, dtype=torch.float64)
        self.discard()

    def discard(self) -> None:
        """Forget the tokens seen since the last step."""
        self._shifts: list[Tensor] = []
        self._masks: list[Tensor] = []

    def move(self, device: torch.device) -> None:
        self.value = self.value.to(device)

    def add(self, policy_shift: Tensor, mask: Tensor) -> None:
        """Some of the step's tokens: ``policy_shift [N]``, those in ``mask [N]`` bool.

        Does not wait for the device.
        """
        self._shifts.append(policy_shift)
        self._masks.append(mask)

    def step(self, comparable: Tensor | bool, dtype: torch.dtype) -> None:
        """Move by the quantile of the tokens added. Collective; does not wait for the device.

        Args:
            comparable: False if this step's m_F is not on the scale of later ones; then nothing
                moves.
            dtype: of the shifts, the same on all ranks.
        """
        device = self.value.device
        # Joined before their bits are looked at: micro-batches may differ in dtype.
        shifts = torch.cat([torch.empty(0, device=device, dtype=dtype), *self._shifts])
        mask = torch.cat([torch.empty(0, device=device, dtype=torch.bool), *self._masks])
        count = collectives.sum_(mask.sum(), self._groups)
        share = 1 - self._target.target_rejection
        found = nearest_rank(ordered_keys(shifts, mask)[None], count, (share,), self._groups)[
            0, 0
        ].double()
        memory = self._target.memory
        moved = (memory * self.value.log() + (1 - memory) * found.log()).exp()
        # A quantile of 0 (no advantage anywhere) has no logarithm, and would reject everything ever
        # after.
        known = (found > 0) & found.isfinite() & comparable
        self.value = torch.where(known, torch.where(self.value.isinf(), found, moved), self.value)
        self.discard()

    def state(self) -> dict[str, float]:
        """Empty before the first quantile. Waits for the device."""
        value = float(self.value)
        return {} if math.isinf(value) else {"policy_threshold": value}

    def load(self, state: dict[str, float]) -> None:
        self.value = torch.full_like(self.value, state.get("policy_threshold", torch.inf))
