# SPDX-License-Identifier: Apache-2.0
"""Inputs of rival losses that verl does not hand to its policy losses.

verl's ``ppo_loss`` knows entropies, the epoch and the ranks and does not hand them to the policy
loss it calls: a context does. Advantages that look at whole groups are made in verl's trainer,
which has them at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from torch import Tensor

from capo_verl.config.rivals import RIVAL_SPECS, RivalConfig
from capo_verl.rivals import RIVALS

EPOCH = "capo_epoch"
"""Key of a mini-batch: how often its batch was used before in this training step."""


@dataclass(frozen=True)
class LossInputs:
    """Inputs of the micro-batch whose loss is being computed."""

    model_output: dict[str, Tensor]
    data: TensorDict
    dp_group: Any

    @property
    def entropy(self) -> Tensor:
        """Entropy of the current policy (nats), ``[B, T]``, without gradient.

        Raises:
            ValueError: if the engine did not compute it.
        """
        from verl.workers.utils.padding import no_padding_2_padding

        if self.model_output.get("entropy") is None:
            raise ValueError(
                "this rival needs entropies: set actor_rollout_ref.actor.calculate_entropy=True"
            )
        return no_padding_2_padding(self.model_output["entropy"].detach(), self.data)

    @property
    def epoch(self) -> int:
        from verl.utils import tensordict_utils as tu

        return tu.get_non_tensor_data(self.data, key=EPOCH, default=0)


_CURRENT: ContextVar[LossInputs | None] = ContextVar("capo_loss_inputs", default=None)


def current() -> LossInputs | None:
    """The inputs of the ``ppo_loss`` that is running, None outside of it."""
    return _CURRENT.get()


def hand_on(losses: ModuleType) -> None:
    """Wrap ``verl.workers.utils.losses.ppo_loss``, which changes nothing but for rival losses."""
    ppo_loss = losses.ppo_loss

    @functools.wraps(ppo_loss)
    def with_inputs(
        config: Any, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
    ) -> Any:
        if config.policy_loss.get("loss_mode", "vanilla") not in RIVAL_SPECS:
            return ppo_loss(config, model_output, data, dp_group)
        token = _CURRENT.set(LossInputs(model_output, data, dp_group))
        try:
            return ppo_loss(config, model_output, data, dp_group)
        finally:
            _CURRENT.reset(token)

    losses.ppo_loss = with_inputs  # type: ignore[attr-defined]


def count_epochs(tensordict_utils: ModuleType) -> None:
    """Let ``verl.utils.tensordict_utils.make_iterator`` number the epochs of mini-batches."""
    make_iterator = tensordict_utils.make_iterator

    @functools.wraps(make_iterator)
    def counting(
        tensordict: TensorDict, mini_batch_size: int, epochs: int, *args: Any, **kwargs: Any
    ) -> Iterator[TensorDict]:
        iterator = make_iterator(tensordict, mini_batch_size, epochs, *args, **kwargs)
        per_epoch = max(1, tensordict.batch_size[0] // mini_batch_size)

        def numbered() -> Iterator[TensorDict]:
            for i, mini_batch in enumerate(iterator):
                tensordict_utils.assign_non_tensor(mini_batch, **{EPOCH: i // per_epoch})
                yield mini_batch

        return numbered()

    tensordict_utils.make_iterator = counting  # type: ignore[attr-defined]


_FIELDS = ("uid", "responses", "response_mask", "advantages")


def weigh(
    data: TensorDict, config: RivalConfig, progress: float = 0.0
) -> tuple[torch.Tensor, dict[str, float]]:
    """Advantages of a rival that needs whole groups, for a batch as verl's queue holds it.

    Args:
        data: whole groups; ``uid`` per response, ``responses``, ``response_mask``, ``advantages``
            and, if the config needs it, ``entropy``, nested ``[B, j]``.
        progress: of the training, from 0 to 1.

    Returns:
        Padded advantages ``[B, T]`` and metrics.

    Raises:
        ValueError: for advantages of which the rival can make nothing.
    """
    uid = data.get("uid")
    uid = uid.tolist() if hasattr(uid, "tolist") else uid
    group = torch.from_numpy(np.unique(np.array(uid, dtype=str), return_inverse=True)[1])

    def padded(name: str) -> torch.Tensor:
        return data[name].to_padded_tensor(0) if data[name].is_nested else data[name]

    rival = RIVALS[config.name]
    assert rival.whole_groups is not None
    inputs: dict[str, Any] = {
        "group": group.reshape(-1).to(data["advantages"].device), "progress": progress,
        "tokens": padded("responses"),
        "entropy": padded("entropy") if "entropy" in data.keys() else None,  # noqa: SIM118 (a TensorDict is no mapping)
    }  # fmt: skip
    wanted = rival.needs | RIVAL_SPECS[config.name].optional
    advantages, metrics = rival.whole_groups.advantages(
        padded("advantages"), padded("response_mask"),
        **rival.whole_groups.split(asdict(config.knobs))[0],
        **{name: inputs[name] for name in wanted},
    )  # fmt: skip
    return advantages, {f"actor/{name}": float(value) for name, value in metrics.items()}


def follow_advantages(trainer_base: ModuleType) -> None:
    """Wrap ``_compute_advantage`` of verl's trainer.

    If the loss is a rival that needs whole groups, it goes on to the rival's advantages; else
    nothing changes.
    """
    trainer, queue = trainer_base.PPOTrainer, trainer_base.tq
    compute_advantage = trainer._compute_advantage

    @functools.wraps(compute_advantage)
    def compute(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = compute_advantage(self, batch, metrics)
        policy_loss = self.config.actor_rollout_ref.actor.policy_loss
        name = policy_loss.get("loss_mode")
        if name not in RIVAL_SPECS or not RIVAL_SPECS[name].whole_groups:
            return batch
        block = OmegaConf.to_container(
            OmegaConf.create(policy_loss.get("rival") or {"name": name}), resolve=True
        )
        config = RivalConfig.from_mapping(cast("Mapping[str, Any]", block))
        fields = [*_FIELDS, *(["entropy"] if config.needs_entropy else [])]
        data = queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        progress = 0.0
        if "progress" in RIVAL_SPECS[name].optional:
            progress = min(1.0, (self.global_steps - 1) / max(1, self.total_training_steps - 1))
        advantages, more = weigh(data, config, progress)
        metrics.update(more)
        nested = trainer_base.response_to_nested(advantages, data["response_mask"])
        output = TensorDict({"advantages": nested}, batch_size=len(batch))
        return queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=output)

    trainer._compute_advantage = compute
