# SPDX-License-Identifier: Apache-2.0
"""The penalty of every token as one term of verl's loss."""

from __future__ import annotations

from typing import Any

import torch
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
    mask = kept.select("response_mask").to_padded_tensor()["response_mask"].to(bool)
    if penalty.is_nested:
        penalty = torch.nested.to_padded_tensor(penalty, 0.0, output_size=mask.shape)
    sizes = {name: kept[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    return agg_loss(
        loss_mat=penalty,
        loss_mask=mask,
        loss_agg_mode=actor_config.loss_agg_mode,
        loss_scale_factor=actor_config.loss_scale_factor,
        **sizes,
    )
