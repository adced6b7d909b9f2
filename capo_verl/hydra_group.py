# SPDX-License-Identifier: Apache-2.0
"""The presets of ``capo_verl.config`` as Hydra config group ``capo``."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from capo_verl.config import PRESETS, verl_knobs

POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"
TARGET = "capo_verl.config.CapoPolicyLossConfig"
"""``policy_loss._target_`` of a run with ``+capo`` or ``+rival``: the dataclass that carries their knobs to the workers."""


def preset_node(name: str) -> DictConfig:
    """What ``+capo=NAME`` adds to verl's config: the dataclass that carries the knobs, the knobs, the matching settings."""
    node = OmegaConf.create({})
    for path, value in PRESETS[name].verl.items():
        OmegaConf.update(node, path, value)
    policy_loss: dict[str, Any] = {"_target_": TARGET}
    OmegaConf.update(node, POLICY_LOSS, policy_loss)
    # Where the checkpoints go, every node of the run can write.
    places = {"sample_tokens_dir": "${trainer.default_local_dir}"}
    knobs = OmegaConf.create({"preset": name, **verl_knobs(name), **places})
    # An unknown key must reach our own check, which lists the valid ones; Hydra's would only say "not in struct".
    OmegaConf.set_struct(knobs, False)
    OmegaConf.update(node, f"{POLICY_LOSS}.capo", knobs)
    return node


def store_presets() -> None:
    store = ConfigStore.instance()
    for name in PRESETS:
        store.store(group="capo", name=name, node=preset_node(name), package="_global_", provider="capo_verl")
