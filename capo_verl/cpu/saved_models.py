# SPDX-License-Identifier: Apache-2.0
"""Copies of the model beside the one that trains, on a CPU (``trainer_mode=separate_async``).

verl keeps the weights of the last synchronisation to compute old log-probabilities with. Without an
accelerator its copies (``verl/utils/fsdp_utils.py:1167``: ``tensor.cpu()``) are the weights
themselves, and memory that is pinned (``verl/utils/megatron_utils.py:1937``) does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_map


def patch(module: ModuleType) -> None:
    """Let the actor of ``verl.experimental.separation.engine_workers`` make copies of its own."""
    worker = module.DetachActorWorker
    handler = worker.copy_handler.fget

    def copy_handler(self: Any) -> Callable[[Any], Any]:
        save = handler(self)

        def copied(model: Any) -> Any:
            with _pageable():
                return tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, save(model))

        return copied

    worker.copy_handler = property(copy_handler)


@contextmanager
def _pageable() -> Iterator[None]:
    pin = torch.Tensor.pin_memory
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.pin_memory = pin  # type: ignore[method-assign]
