# SPDX-License-Identifier: Apache-2.0
"""Stops filtering for good when too much is rejected for too long: a policy trained on what is left
over decays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capo_verl.core import collectives


class RejectionGuard:
    """Counts optimizer steps in a row in which more than a share ``limit`` of the tokens' weight
    was taken away.

    Args:
        limit: share of the response tokens; with soft weights, of their weight.
        steps: so many steps in a row end the filtering.
        groups: groups over which the tokens of a step are spread.

    Attributes:
        stopped: scalar bool on the device.
    """

    def __init__(
        self, limit: float, steps: int, device: torch.device, groups: Sequence[collectives.Group]
    ):
        self._limit, self._steps, self._groups = limit, steps, groups
        self.stopped = torch.zeros((), device=device, dtype=torch.bool)
        self._streak = torch.zeros((), device=device, dtype=torch.int64)
        self.discard()

    def discard(self) -> None:
        """Forget the tokens seen since the last step."""
        self._sums: list[Tensor] = []

    def move(self, device: torch.device) -> None:
        self.stopped, self._streak = self.stopped.to(device), self._streak.to(device)

    def add(self, weights: Tensor, mask: Tensor) -> None:
        """Some of the step's tokens, ``[N]`` each: the weights of the trust region, and the mask of
        those that count.
        """
        kept = torch.where(mask, weights, 0.0).sum(dtype=torch.float64)
        self._sums.append(torch.stack((kept, mask.sum().double())))

    def step(self) -> None:
        """Judge the tokens added; a step without any changes nothing.

        Collective; does not wait for the device.
        """
        sums = (
            torch.stack(self._sums).sum(0)
            if self._sums
            else torch.zeros(2, device=self._streak.device).double()
        )
        kept, tokens = collectives.sum_(sums, self._groups)
        streak = torch.where(tokens - kept > self._limit * tokens, self._streak + 1, 0)
        self._streak = torch.where(tokens > 0, streak, self._streak)
        self.stopped = self.stopped | (self._streak >= self._steps)
        self.discard()

    def state(self) -> dict[str, float]:
        """Waits for the device."""
        return {"filter_stopped": float(self.stopped), "rejection_streak": float(self._streak)}

    def load(self, state: dict[str, float]) -> None:
        self.stopped = torch.full_like(self.stopped, state.get("filter_stopped", 0.0) > 0)
        self._streak = torch.full_like(self._streak, int(state.get("rejection_streak", 0)))
