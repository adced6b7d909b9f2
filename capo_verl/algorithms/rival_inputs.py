# SPDX-License-Identifier: Apache-2.0
"""What verl's ``ppo_loss`` knows and does not hand to the policy loss it calls: entropies, the epoch, the ranks.

verl passes a policy loss four tensors. Here its ``ppo_loss`` is wrapped such that, while it runs for a rival, the rest of what
it was given can be asked for; and its iterator over mini-batches says how often the batch was used before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tensordict import TensorDict
from torch import Tensor

from capo_verl.rival_config import RIVAL_SPECS

EPOCH = "capo_epoch"
"""Key of a mini-batch: how often the batch it was taken from was used before, in this training step."""


@dataclass(frozen=True)
class LossInputs:
    """Of the micro-batch whose loss is being computed."""

    model_output: dict[str, Tensor]
    data: TensorDict
    dp_group: Any

    @property
    def entropy(self) -> Tensor:
        """``[B, T]``, of the current policy, without gradient (nats).

        Raises:
            ValueError: if the engine did not compute it.
        """
        from verl.workers.utils.padding import no_padding_2_padding

        if self.model_output.get("entropy") is None:
            raise ValueError("this rival needs entropies: set actor_rollout_ref.actor.calculate_entropy=True")
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
    """Wrap ``verl.workers.utils.losses.ppo_loss``; for other losses than the rivals it does what it did."""
    ppo_loss = losses.ppo_loss

    @functools.wraps(ppo_loss)
    def with_inputs(config, model_output, data, dp_group=None):  # type: ignore[no-untyped-def]
        if config.policy_loss.get("loss_mode", "vanilla") not in RIVAL_SPECS:
            return ppo_loss(config, model_output, data, dp_group)
        token = _CURRENT.set(LossInputs(model_output, data, dp_group))
        try:
            return ppo_loss(config, model_output, data, dp_group)
        finally:
            _CURRENT.reset(token)

    losses.ppo_loss = with_inputs


def count_epochs(tensordict_utils: ModuleType) -> None:
    """Wrap ``verl.utils.tensordict_utils.make_iterator`` so that every mini-batch carries its epoch."""
    make_iterator = tensordict_utils.make_iterator

    @functools.wraps(make_iterator)
    def counting(tensordict: TensorDict, mini_batch_size: int, epochs: int, *args: Any, **kwargs: Any) -> Iterator:
        iterator = make_iterator(tensordict, mini_batch_size, epochs, *args, **kwargs)
        per_epoch = max(1, tensordict.batch_size[0] // mini_batch_size)

        def numbered() -> Iterator:
            for i, mini_batch in enumerate(iterator):
                tensordict_utils.assign_non_tensor(mini_batch, **{EPOCH: i // per_epoch})
                yield mini_batch

        return numbered()

    tensordict_utils.make_iterator = counting
