# SPDX-License-Identifier: Apache-2.0
"""verl's policy-loss dataclass with CAPO's knobs; ``actor.policy_loss._target_`` names it to switch CAPO on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.workers.config.actor import PolicyLossConfig

from capo_verl import plugin
from capo_verl.config import FROM_OPTIMIZER, PRESETS, CapoConfig


def parse_knobs(knobs: Mapping[str, Any]) -> CapoConfig:
    """The block ``actor_rollout_ref.actor.policy_loss.capo`` as a checked config.

    Raises:
        ValueError: for an unknown key, an invalid value, or a knob which belongs to the optimizer.
    """
    knobs = dict(knobs)
    preset = knobs.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"capo.preset={preset!r}: expected one of {', '.join(PRESETS)}")
    for name in FROM_OPTIMIZER:
        if name in knobs:
            raise ValueError(
                f"capo.{name} is read from the actor's optimizer; set actor_rollout_ref.actor.optim.* instead"
            )
    return CapoConfig.from_mapping(knobs, exclude=FROM_OPTIMIZER)


@dataclass
class CapoPolicyLossConfig(PolicyLossConfig):
    """verl's policy-loss settings plus ``capo``, the knobs of the filter.

    Raises:
        ValueError: for invalid knobs.
        RuntimeError: if the plugin failed to register, so that a CAPO run never silently trains without CAPO.
    """

    capo: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        plugin.raise_if_broken()
        if not isinstance(self.capo, CapoConfig):
            self.__dict__["capo"] = parse_knobs(self.capo)  # verl's dataclasses are frozen once set
