# SPDX-License-Identifier: Apache-2.0
"""The penalty of every token as one term of verl's loss."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor


def aggregated_penalty(penalty: Tensor, kept: TensorDict, actor_config: Any) -> Tensor:
    """Mean penalty of the kept tokens, aggregated as verl's ``ppo_loss`` aggregates the policy loss.

    Args:
        penalty: of the responses, nested or padded like ``response_mask``; part of a graph.
        kept: the micro-batch whose response mask holds the tokens that are kept.
        actor_config: verl's actor config: ``loss_agg_mode``, ``loss_scale_factor``.

    Returns:
        Scalar, to be added to the loss.

    Raises:
        ValueError: without the config.
    """
    # Here and not above: loading verl's trainer loads our plugin, which imports this module.
    from verl.trainer.ppo.core_algos import agg_loss

    if actor_config is None:
        raise ValueError(
            "a penalty (capo.policy_penalty, capo.objective_penalty) needs verl's actor config to be aggregated"
        )
    padded = TensorDict(
        {"penalty": penalty, "mask": kept["response_mask"]}, batch_size=kept.batch_size
    ).to_padded_tensor()
    sizes = {name: kept[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    return agg_loss(
        loss_mat=padded["penalty"],
        loss_mask=padded["mask"].to(bool),
        loss_agg_mode=actor_config.loss_agg_mode,
        loss_scale_factor=actor_config.loss_scale_factor,
        **sizes,
    )
