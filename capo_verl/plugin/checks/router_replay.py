# SPDX-License-Identifier: Apache-2.0
"""Requirements of verl's router replay, whose engine would miss the choices of experts at the first
update (``verl/workers/engine/megatron/transformer_impl.py:1312``).
"""

from __future__ import annotations

import contextlib

from omegaconf import DictConfig, OmegaConf

from capo_verl.plugin.checks.model_shape import find_shape
from capo_verl.plugin.checks.run_spec import ACTOR, MODEL, ROLLOUT

MODE = f"{ACTOR}.megatron.router_replay.mode"
RETURNED = f"{ROLLOUT}.enable_rollout_routing_replay"
BYPASS = "algorithm.rollout_correction.bypass_mode"


def check_router_replay(config: DictConfig) -> None:
    """Check who tells the engine which experts to take.

    Raises:
        ValueError: naming key and value, and what to set.
    """
    mode, returned = (OmegaConf.select(config, key) for key in (MODE, RETURNED))
    if OmegaConf.select(config, f"{ACTOR}.strategy") != "megatron":
        mode = None
    if mode not in ("R2", "R3"):
        if returned:
            _check_experts(config, f"{RETURNED}=True", "False")
        return
    if mode == "R3" and not returned:
        raise ValueError(
            f"{MODE}=R3 takes the experts that the rollout engine chose: set {RETURNED}=True"
        )
    if mode == "R2" and returned:
        raise ValueError(f"{MODE}=R2 records the experts itself: set it to R3, or {RETURNED}=False")
    if mode == "R2" and OmegaConf.select(config, BYPASS):
        raise ValueError(
            f"{MODE}=R2 records the experts in the pass for the old log-probs, which {BYPASS}=True "
            "leaves out: set it to R3, or bypass_mode to False"
        )
    _check_experts(config, f"{MODE}={mode}", "disabled")


def _check_experts(config: DictConfig, what: str, instead: str) -> None:
    shape = None
    with contextlib.suppress(ValueError):  # a model whose sizes mean something else
        shape = find_shape(OmegaConf.select(config, f"{MODEL}.path"))
    if shape is not None and not shape.experts:
        raise ValueError(f"{what}: {shape.name} has no experts; set it to {instead}")
