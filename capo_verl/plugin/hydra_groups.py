# SPDX-License-Identifier: Apache-2.0
"""The switches as Hydra config groups: ``capo``, the presets, and ``rival``, the rival losses."""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from capo_verl.config import PRESETS, verl_knobs
from capo_verl.config.rivals import RIVAL_SPECS

POLICY_LOSS = "actor_rollout_ref.actor.policy_loss"
TARGET = "capo_verl.plugin.policy_loss.CapoPolicyLossConfig"
"""Value of ``policy_loss._target_`` in a run with ``+capo`` or ``+rival``.

It is the dataclass that carries their knobs to the workers.
"""
TARGETS = (TARGET, "capo_verl.config.CapoPolicyLossConfig")
"""Names of that dataclass; the second is that of releases before 0.2."""


def preset_node(name: str) -> DictConfig:
    """The part of verl's config that ``+capo=NAME`` adds.

    It has the dataclass that carries the knobs, the knobs, and the matching settings.
    """
    node = OmegaConf.create({})
    for path, value in PRESETS[name].verl.items():
        OmegaConf.update(node, path, value)
    policy_loss: dict[str, Any] = {"_target_": TARGET}
    OmegaConf.update(node, POLICY_LOSS, policy_loss)
    # Where the checkpoints go, every node of the run can write.
    places = {"sample_tokens_dir": "${trainer.default_local_dir}"}
    knobs = OmegaConf.create({"preset": name, **verl_knobs(name), **places})
    # An unknown key must reach our own check, which lists the valid ones; Hydra's would only say
    # "not in struct".
    OmegaConf.set_struct(knobs, False)
    OmegaConf.update(node, f"{POLICY_LOSS}.capo", knobs)
    return node


def rival_node(name: str) -> DictConfig:
    """The part of verl's config that ``+rival=NAME`` adds.

    It has the loss, its knobs, and the dataclass that carries them.
    """
    spec = RIVAL_SPECS[name]
    node = OmegaConf.create({})
    for path, value in spec.verl.items():
        OmegaConf.update(node, path, value)
    # The same dataclass as +capo: the two go together in either order.
    OmegaConf.update(node, f"{POLICY_LOSS}._target_", TARGET)
    OmegaConf.update(node, f"{POLICY_LOSS}.loss_mode", name)
    knobs = OmegaConf.create({"name": name, **spec.defaults()})
    OmegaConf.set_struct(knobs, False)  # an unknown key must reach our own check
    OmegaConf.update(node, f"{POLICY_LOSS}.rival", knobs)
    return node


def store_groups() -> None:
    """Make both groups known to Hydra."""
    store = ConfigStore.instance()
    for group, names, node_of in (
        ("capo", PRESETS, preset_node),
        ("rival", RIVAL_SPECS, rival_node),
    ):
        for name in names:
            store.store(
                group=group, name=name, node=node_of(name), package="_global_", provider="capo_verl"
            )
