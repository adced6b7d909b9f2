# SPDX-License-Identifier: Apache-2.0
"""verl's policy-loss dataclass with CAPO's knobs; ``actor.policy_loss._target_`` names it to switch
CAPO on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.workers.config.actor import PolicyLossConfig

from capo_verl.config import CapoConfig, parse_knobs
from capo_verl.config.rivals import RivalConfig
from capo_verl.plugin.state import raise_if_broken


@dataclass
class CapoPolicyLossConfig(PolicyLossConfig):
    """verl's policy-loss settings plus ``capo``, the knobs of the filter, and ``rival``, those of a
    rival loss.

    Raises:
        ValueError: for invalid knobs.
        RuntimeError: if the plugin failed to register, so that a CAPO run never silently trains
            without CAPO.
    """

    capo: Any = None
    """None = no CAPO: verl's own engine."""
    rival: Any = None
    """The rival that ``loss_mode`` names and its knobs; None = its defaults, if it names one."""

    def __post_init__(self) -> None:
        raise_if_broken()
        # verl's dataclasses are frozen once set.
        if self.capo is not None and not isinstance(self.capo, CapoConfig):
            self.__dict__["capo"] = parse_knobs(self.capo)
        if self.rival is not None and not isinstance(self.rival, RivalConfig):
            self.__dict__["rival"] = RivalConfig.from_mapping(self.rival)
        if self.rival is not None and self.rival.name != self.loss_mode:
            raise ValueError(
                f"policy_loss.loss_mode={self.loss_mode}: set it to {self.rival.name}, as "
                "policy_loss.rival.name"
            )
