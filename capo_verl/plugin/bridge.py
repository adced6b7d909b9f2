# SPDX-License-Identifier: Apache-2.0
"""Choice between verl's two ways to Hugging Face weights: Megatron-Bridge, or mbridge.

``actor_rollout_ref.actor.megatron.vanilla_mbridge`` says it. verl's default, False, is
Megatron-Bridge, which needs Python 3.12; the stack for CPUs has mbridge only. There the default
takes what is installed, and only a run that asks for Megatron-Bridge is refused without it.
"""

from __future__ import annotations

import importlib.util

from omegaconf import DictConfig, OmegaConf

from capo_verl.plugin.state import on_cpu

KEYS = tuple(
    f"{part}.megatron.vanilla_mbridge"
    for part in ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic")
)
PADDING = "actor_rollout_ref.actor.megatron.override_transformer_config.should_pad_vocab"
NEEDED = ("megatron.bridge", "modelopt")
"""Modules without which Megatron-Bridge cannot be imported, beyond what verl needs."""


def lacking() -> str:
    """The first of ``NEEDED`` that is not installed; empty if all are."""
    return next((name for name in NEEDED if not _installed(name)), "")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def is_megatron_bridge(vanilla_mbridge: bool, cpu: bool) -> bool:
    """True if Megatron-Bridge converts the weights of a run.

    Args:
        vanilla_mbridge: the run's setting.
        cpu: whether it runs on the embedded CPU default.
    """
    return not vanilla_mbridge and not (cpu and lacking())


def refusal(key: str, reason: str) -> str:
    """The sentence for a run that wants Megatron-Bridge and cannot have it."""
    return (
        f"{key}=False needs Megatron-Bridge ({reason}): install it as "
        "scripts/gpu_stack.requirements.txt does, with Python 3.12, or set it to True, for mbridge"
    )


def check_bridge(config: DictConfig) -> None:
    """Check that a run which asks for Megatron-Bridge, or for what only that knows, has it.

    Raises:
        ValueError: if it is not installed, on a CPU; if mbridge is given an option of its.
    """
    if on_cpu() and (missing := lacking()):
        for key in KEYS:
            if _was_given(key) and OmegaConf.select(config, key) is False:
                raise ValueError(refusal(key, f"{missing} is not installed"))
    vanilla_mbridge = bool(OmegaConf.select(config, KEYS[0]))
    padding = OmegaConf.select(config, PADDING)
    if padding is not None and not is_megatron_bridge(vanilla_mbridge, on_cpu()):
        raise ValueError(f"{PADDING}={padding} is Megatron-Bridge's, and mbridge runs: remove it")


def _was_given(key: str) -> bool:
    """True if the command line sets the key: its default does not ask for anything."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return False
    given = HydraConfig.get().overrides.task
    return any(override.partition("=")[0].lstrip("+") == key for override in given)
