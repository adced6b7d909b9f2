# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's distributed optimizer on a CPU, with torch's AdamW inside.

Its arithmetic runs on any device. What does not (line numbers of
``megatron/core/optimizer/distrib_optimizer.py``):

* Parameters are sorted by the string ``'torch.cuda.FloatTensor'`` (420).
* Without Transformer Engine and Apex, saving and loading before the first step find no count of
  steps (641).
* Float32 shards are views of the parameters, and a checkpoint is read into them without ``no_grad``
  (940).
* Loading gives all parameters one and the same tensor ``step`` (825), which then counts every
  parameter, and keeps its value from before the loading or finds none to take (940). What the
  checkpoint holds is in the parameter group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Context in which ``tensor.type()`` names the CUDA type."""

    def type_of(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = super(torch.Tensor, tensor).type(*args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    torch.Tensor.type = type_of  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del torch.Tensor.type  # uncovers the method of the base class


def start_adam(optimizer: Any) -> None:
    """Give every shard the state that torch's AdamW would give it in its first step."""
    for part in optimizer.chained_optimizers:
        if not isinstance(part, DistributedOptimizer):
            continue
        for group in part.optimizer.param_groups:
            for shard in group["params"]:
                part.optimizer.state[shard].update(
                    step=torch.tensor(0.0),
                    exp_avg=torch.zeros_like(shard),
                    exp_avg_sq=torch.zeros_like(shard),
                )


@contextmanager
def loading(optimizer: Any) -> Iterator[None]:
    """Context of loading a checkpoint into Megatron-Core's ``optimizer``; None without one."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def without_step(
        self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> None:
        group, order = self.model_param_group_index_map[model_param]
        self.optimizer.state[self.optimizer.param_groups[group]["params"][order]].pop("step", None)
        original(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = without_step
    try:
        with torch.no_grad():
            yield
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = original
    for part in optimizer.chained_optimizers if optimizer is not None else ():
        if not isinstance(part, DistributedOptimizer):
            continue
        for group in part.optimizer.param_groups:
            for shard in group["params"]:
                part.optimizer.state[shard]["step"] = torch.tensor(float(group["step"]))
