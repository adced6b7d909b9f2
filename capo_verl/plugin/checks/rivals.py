# SPDX-License-Identifier: Apache-2.0
"""Refusals before a run with a rival loss starts."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from capo_verl.config.rivals import RIVAL_SPECS, RivalConfig
from capo_verl.plugin.hydra_groups import POLICY_LOSS, TARGETS


def check_rival(config: DictConfig) -> None:
    """Check what verl's whole config says about a rival; nothing if it names none.

    Raises:
        ValueError: for invalid knobs, or settings without which the rival would not be what its
            name says.
    """

    def value(path: str) -> Any:
        return OmegaConf.select(config, path)

    name, block = value(f"{POLICY_LOSS}.loss_mode"), value(f"{POLICY_LOSS}.rival")
    if block is not None:
        if value(f"{POLICY_LOSS}._target_") not in TARGETS:
            raise ValueError(
                f"{POLICY_LOSS}.rival is set without the switch; add +rival={block.get('name')}"
            )
        rival = RivalConfig.from_mapping(block)
    elif name in RIVAL_SPECS:
        rival = RivalConfig.from_mapping({"name": name})
    else:
        return
    if rival.name != name:
        raise ValueError(
            f"{POLICY_LOSS}.loss_mode={name}: +rival={rival.name} needs loss_mode={rival.name}"
        )
    actor = "actor_rollout_ref.actor"
    if name == "entropy_mask" and not (
        value(f"{actor}.calculate_entropy") or value(f"{actor}.entropy_coeff")
    ):
        raise ValueError(
            f"{actor}.calculate_entropy=False: rival.name=entropy_mask needs entropies; set it to "
            "True"
        )
    if (
        name == "lopti"
        and getattr(rival.knobs, "part", None) == "alternate"
        and (value(f"{actor}.ppo_epochs") or 1) % 2
    ):
        raise ValueError(
            f"{actor}.ppo_epochs={value(f'{actor}.ppo_epochs')}: rival.part=alternate trains on "
            "the low-probability tokens in one epoch and on the others in the next; set it to an "
            "even number"
        )
    if not RIVAL_SPECS[name].whole_groups:
        return
    if value("trainer.use_v1") is False:
        raise ValueError(
            f"trainer.use_v1=False: rival.name={name} makes its advantages in the v1 trainer; set "
            "it to True"
        )
    bypass = "algorithm.rollout_correction.bypass_mode"
    if value(bypass) and rival.needs_entropy:
        knob = "rival.entropy_max to null, or " if hasattr(rival.knobs, "entropy_max") else ""
        raise ValueError(
            f"{bypass}=True: no entropies for rival.name={name}; set {knob}bypass_mode to False"
        )
    if name == "bnpo" and value("algorithm.adv_estimator") != "reinforce":
        raise ValueError(
            f"algorithm.adv_estimator={value('algorithm.adv_estimator')}: rival.name=bnpo "
            "normalises rewards itself; set it to reinforce"
        )
    if name == "pacs":
        _check_one_update(value)


def _check_one_update(value: Any) -> None:
    """PACS' weights are those of the first update of a batch; with a second one they would be
    wrong.
    """
    actor = "actor_rollout_ref.actor"
    for path, one in (
        (f"{actor}.ppo_epochs", 1),
        (f"{actor}.ppo_mini_batch_size", value("data.train_batch_size")),
    ):
        if value(path) != one:
            raise ValueError(
                f"{path}={value(path)}: rival.name=pacs makes its weights for one update per "
                f"batch; set it to {one}"
            )
