# SPDX-License-Identifier: Apache-2.0
"""All that an object holds, as plain values to compare: what a refusal must not change."""

from __future__ import annotations

from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch


def contents(x: Any) -> Any:
    """A copy of ``x`` and of all that it holds: tensors as dtype, shape and bits."""
    if isinstance(x, torch.Tensor):
        bits = x.detach().clone().contiguous().flatten().view(torch.uint8).tolist()
        return str(x.dtype), tuple(x.shape), bits
    if isinstance(x, dict):
        return {key: contents(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [contents(value) for value in x]
    if isinstance(x, ModuleType | FunctionType | MethodType | type):
        return x
    return contents(vars(x)) if hasattr(x, "__dict__") else repr(x)
