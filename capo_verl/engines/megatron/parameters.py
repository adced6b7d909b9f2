# SPDX-License-Identifier: Apache-2.0
"""The parameters that this rank's part of Megatron's optimizer writes to, and how the model learns
of a change to them.

In bfloat16 training these are the float32 copies, with the distributed optimizer this rank's shards
of them; what ``MegatronOptimizer.step_with_ready_grads`` does after the inner step has to be done
after a change by hand as well (``megatron/core/optimizer/optimizer.py``, ``distrib_optimizer.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor


def optimised(optimizer: Any, module: Sequence[Any]) -> list[Tensor]:
    """The tensors that the inner optimizers write to.

    Waits for gathers under way (``overlap_param_gather``): they would write over a change by hand,
    and :func:`spread` would take them for its own.
    """
    for chunk in module:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
            for buckets in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                if buckets.param_gather_handle is not None:
                    buckets.param_gather_handle.wait()
                    buckets.param_gather_handle = None
    return [
        p.data
        for part in _parts(optimizer)
        for group in part.optimizer.param_groups
        for p in group["params"]
    ]


@torch.no_grad()
def spread(optimizer: Any, module: Sequence[Any]) -> None:
    """Copy the tensors of :func:`optimised` to the model's parameters and gather the shards.

    Collective.
    """
    for part in _parts(optimizer):
        if hasattr(part, "_copy_main_params_to_model_params"):
            part._copy_main_params_to_model_params()
    for chunk in module:
        if getattr(getattr(chunk, "ddp_config", None), "use_distributed_optimizer", False):
            chunk.start_param_sync(force_sync=True)


def check_reachable(optimizer: Any) -> None:
    """
    Raises:
        ValueError: if the optimizer keeps its float32 parameters elsewhere.
    """
    override = "actor_rollout_ref.actor.optim.override_optimizer_config"
    for part in _parts(optimizer):
        for found, key in (
            (isinstance(part.optimizer, HybridDeviceOptimizer), "optimizer_cpu_offload"),
            (part.config.use_precision_aware_optimizer, "use_precision_aware_optimizer"),
            (
                getattr(part.config, "reuse_grad_buf_for_mxfp8_param_ag", False),
                "reuse_grad_buf_for_mxfp8_param_ag",
            ),
        ):
            if found:
                raise ValueError(
                    f"capo.kl_budget.line_search cannot step back with {key}: set "
                    f"{override}.{key}=False, or line_search=null"
                )


def _parts(optimizer: Any) -> Iterator[Any]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not getattr(part, "is_stub_optimizer", False):
            yield part
