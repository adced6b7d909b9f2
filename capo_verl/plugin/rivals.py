# SPDX-License-Identifier: Apache-2.0
"""The rivals as policy losses of verl: ``policy_loss.loss_mode=NAME``.

Their knobs are in ``policy_loss.rival``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from capo_verl.config.rivals import RivalConfig
from capo_verl.plugin import rival_inputs
from capo_verl.rivals import RIVALS, Metrics, Rival

PolicyLoss = Callable[..., tuple[Tensor, dict[str, Any]]]


def knobs_of(config: Any, rival: Rival) -> dict[str, Any]:
    """The knobs which verl's actor config carries for a rival, or its defaults."""
    found = getattr(getattr(config, "policy_loss", None), "rival", None)
    return (
        asdict(found.knobs)
        if isinstance(found, RivalConfig) and found.name == rival.name
        else rival.knobs
    )


def _inputs_for(rival: Rival) -> dict[str, Any]:
    """The inputs which the rival needs and ``ppo_loss`` had."""
    inputs = rival_inputs.current()
    if rival.name == "bapo":
        group = None if inputs is None else inputs.dp_group
        return {"dp_group": group if group is not None and dist.get_world_size(group) > 1 else None}
    if rival.needs and inputs is None:
        raise ValueError(
            f"the loss {rival.name} needs {', '.join(sorted(rival.needs))}: call it through verl's "
            "ppo_loss"
        )
    return {name: getattr(inputs, name) for name in rival.needs}


def policy_loss(rival: Rival) -> PolicyLoss:
    """A rival with the signature of verl's policy losses."""

    def compute(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        losses, metrics = _per_token(
            rival, config, old_log_prob, log_prob, advantages, response_mask
        )
        if rollout_is_weights is not None:
            losses = losses * rollout_is_weights
        global_batch = config.global_batch_info if config is not None else {}
        loss = agg_loss(
            loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **global_batch
        )
        return loss, {f"actor/{name}": value.detach() for name, value in metrics.items()}

    compute.__name__ = compute.__qualname__ = f"compute_policy_loss_{rival.name}"
    compute.__doc__ = f"arXiv {rival.paper}; see :mod:`capo_verl.rivals.{rival.name}`."
    return compute


def _per_token(rival: Rival, config: Any, *tensors: Tensor) -> tuple[Tensor, Metrics]:
    knobs = knobs_of(config, rival)
    if rival.whole_groups is not None:  # the trainer has made its advantages (rival_inputs)
        return rival.whole_groups.loss(*tensors, **rival.whole_groups.split(knobs)[1])
    return rival.loss(*tensors, **knobs, **_inputs_for(rival))


for _rival in RIVALS.values():
    register_policy_loss(_rival.name)(policy_loss(_rival))
