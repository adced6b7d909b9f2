# SPDX-License-Identifier: Apache-2.0
"""GTPO's advantages in verl's trainer, where whole groups are at hand (``+rival=gtpo``)."""

from __future__ import annotations

import functools
from dataclasses import asdict
from types import ModuleType
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from capo_verl.algorithms.rivals.gtpo import gtpo_advantages
from capo_verl.rival_config import RivalConfig

_FIELDS = ("uid", "responses", "response_mask", "advantages")


def weigh(data: TensorDict, config: RivalConfig) -> tuple[torch.Tensor, dict[str, float]]:
    """GTPO's advantages for a batch as verl's queue holds it.

    Args:
        data: whole groups; ``uid`` per response, ``responses``, ``response_mask``, ``advantages`` and, if the config needs it,
            ``entropy``, nested ``[B, j]``.

    Returns:
        Padded advantages ``[B, T]`` and metrics.
    """
    uid = data.get("uid")
    uid = uid.tolist() if hasattr(uid, "tolist") else uid
    group = torch.from_numpy(np.unique(np.array(uid, dtype=str), return_inverse=True)[1])

    def padded(name: str) -> torch.Tensor:
        return data[name].to_padded_tensor(0) if data[name].is_nested else data[name]

    entropy = padded("entropy") if "entropy" in data.keys() else None  # noqa: SIM118 (a TensorDict is no mapping)
    advantages, metrics = gtpo_advantages(
        padded("advantages"), padded("response_mask"), tokens=padded("responses"),
        group=group.reshape(-1).to(data["advantages"].device), entropy=entropy, **asdict(config.knobs),
    )  # fmt: skip
    return advantages, {f"actor/{name}": float(value) for name, value in metrics.items()}


def follow_advantages(trainer_base: ModuleType) -> None:
    """Wrap ``_compute_advantage`` of verl's trainer: with ``loss_mode=gtpo`` it goes on to GTPO's, else nothing changes."""
    trainer, queue = trainer_base.PPOTrainer, trainer_base.tq
    compute_advantage = trainer._compute_advantage

    @functools.wraps(compute_advantage)
    def compute(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = compute_advantage(self, batch, metrics)
        policy_loss = self.config.actor_rollout_ref.actor.policy_loss
        if policy_loss.get("loss_mode") != "gtpo":
            return batch
        block = OmegaConf.to_container(OmegaConf.create(policy_loss.get("rival") or {"name": "gtpo"}), resolve=True)
        config = RivalConfig.from_mapping(block)
        fields = [*_FIELDS, *(["entropy"] if config.knobs.entropy_max is not None else [])]  # type: ignore[attr-defined]
        data = queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        advantages, more = weigh(data, config)
        metrics.update(more)
        nested = trainer_base.response_to_nested(advantages, data["response_mask"])
        output = TensorDict({"advantages": nested}, batch_size=len(batch))
        return queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=output)

    trainer._compute_advantage = compute
