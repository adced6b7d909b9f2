# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's literal ``device="cuda"``, sent to the CPU.

Megatron-Core and mbridge name the device in dozens of places (``torch.zeros(1, device="cuda")`` in
``megatron/core/optimizer/clip_grads.py:103``, ``torch.cuda.current_device()`` in
``megatron/core/tensor_parallel/mappings.py:141``). Inside their modules, and nowhere else, the
*name* ``torch`` is bound to a view of torch for which "cuda" means the CPU. ``torch`` itself stays
as it is for everyone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

PACKAGES = ("megatron", "mbridge")
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "rand", "tensor", "zeros")


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _on_cpu(factory: Any) -> Any:
    """Factory that reads ``device="cuda"`` as ``device="cpu"`` and pins no memory."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


class _Stream:
    """The only stream of a CPU: everything on it has already happened."""

    def wait_stream(self, stream: Any) -> None:
        pass

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> _Stream:
        """Something to wait for, as for an event."""
        return self

    def synchronize(self) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass


class _CudaView(ModuleType):
    Stream = _Stream
    """Made by Megatron-Bridge, to allocate gradient buffers on (``model_provider.py``)."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def current_stream(self, device: Any = None) -> _Stream:
        """Asked for by megatron-core >= 0.19 (``distributed/param_and_grad_buffer.py:632``)."""
        return _Stream()

    def stream(self, stream: _Stream) -> _Stream:
        """Context of work on a stream."""
        return stream

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchView(ModuleType):
    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaView()
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_VIEW = _TorchView()


def redirect_cuda_to_cpu() -> list[str]:
    """Bind the view in every module of Megatron-Core and mbridge that is loaded.

    Call it again after more were imported.

    Returns:
        The names of the modules that were rebound by this call.
    """
    rebound = []
    for name, module in list(sys.modules.items()):
        if (
            name.partition(".")[0] in PACKAGES
            and getattr(module, "__dict__", {}).get("torch") is torch
        ):
            module.__dict__["torch"] = _VIEW
            rebound.append(name)
    return rebound


@contextmanager
def cuda_method_stays() -> Iterator[None]:
    """Context in which ``tensor.cuda()`` and ``module.cuda()`` return what they are called on.

    Models are moved to CUDA while they are built: by mbridge (``mbridge/core/util.py:151``), by
    Megatron-Bridge (``models/model_provider.py:632``), and by Megatron-Core where tied embeddings
    meet pipeline stages
    (``megatron/core/models/common/language_module/language_module.py:244``); indices in the forward
    pass, where context parallelism cuts rotary embeddings of padded batches
    (``megatron/core/models/common/embeddings/rope_utils.py:64``).
    """
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        del torch.Tensor.cuda  # uncovers the method of the base class
