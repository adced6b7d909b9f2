# SPDX-License-Identifier: Apache-2.0
"""Inputs of rival losses that verl does not hand to its policy losses.

verl's ``ppo_loss`` knows entropies, the epoch and the ranks and does not hand them to the policy
loss it calls: a context does. GTPO's advantages need whole groups, which are at hand in verl's
trainer.
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

from capo_verl.config.rivals import RIVAL_SPECS, GtpoKnobs, RivalConfig
from capo_verl.rivals.gtpo import gtpo_advantages

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


def weigh(data: TensorDict, config: RivalConfig) -> tuple[torch.Tensor, dict[str, float]]:
    """GTPO's advantages for a batch as verl's queue holds it.

    Args:
        data: whole groups; ``uid`` per response, ``responses``, ``response_mask``, ``advantages``
            and, if the config needs it, ``entropy``, nested ``[B, j]``.

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
        group=group.reshape(-1).to(data["advantages"].device), entropy=entropy,
        **asdict(config.knobs),
    )  # fmt: skip
    return advantages, {f"actor/{name}": float(value) for name, value in metrics.items()}


def follow_advantages(trainer_base: ModuleType) -> None:
    """Wrap ``_compute_advantage`` of verl's trainer.

    With ``loss_mode=gtpo`` it goes on to GTPO's advantages, else nothing changes.
    """
    trainer, queue = trainer_base.PPOTrainer, trainer_base.tq
    compute_advantage = trainer._compute_advantage

    @functools.wraps(compute_advantage)
    def compute(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = compute_advantage(self, batch, metrics)
        policy_loss = self.config.actor_rollout_ref.actor.policy_loss
        if policy_loss.get("loss_mode") != "gtpo":
            return batch
        block = OmegaConf.to_container(
            OmegaConf.create(policy_loss.get("rival") or {"name": "gtpo"}), resolve=True
        )
        config = RivalConfig.from_mapping(cast("Mapping[str, Any]", block))
        needs_entropy = cast(GtpoKnobs, config.knobs).entropy_max is not None
        fields = [*_FIELDS, *(["entropy"] if needs_entropy else [])]
        data = queue.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        )
        advantages, more = weigh(data, config)
        metrics.update(more)
        nested = trainer_base.response_to_nested(advantages, data["response_mask"])
        output = TensorDict({"advantages": nested}, batch_size=len(batch))
        return queue.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=output)

    trainer._compute_advantage = compute
