# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's distributed optimizer on a CPU: parameters sorted by CUDA type names, and torch's AdamW inside.

Its arithmetic runs on any device. Three things do not: parameters are sorted by the string ``'torch.cuda.FloatTensor'``;
float32 shards are views of the parameters, which a checkpoint is read into without ``no_grad``; and without Transformer
Engine or Apex all parameters get one and the same tensor ``step``, which then counts every parameter, and keeps its value
from before the loading (``distrib_optimizer.py:820`` and ``:940``). What the checkpoint holds is in the parameter group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def cuda_type_names() -> Iterator[None]:
    """Within, ``tensor.type()`` names the CUDA type (``megatron/core/optimizer/distrib_optimizer.py:420``)."""

    def type_of(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = super(torch.Tensor, tensor).type(*args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    torch.Tensor.type = type_of
    try:
        yield
    finally:
        del torch.Tensor.type  # uncovers the method of the base class


@contextmanager
def loading(optimizer: Any) -> Iterator[None]:
    """Around the loading of a checkpoint into Megatron-Core's ``optimizer``."""
    with torch.no_grad():  # distrib_optimizer.py:940
        yield
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"] if "step" in group else ():
                part.optimizer.state[parameter]["step"] = torch.tensor(float(group["step"]))
