# SPDX-License-Identifier: Apache-2.0
"""Megatron-Bridge on a CPU: verl's own way to Hugging Face weights (``vanilla_mbridge=False``).

It maps weights of any layers, but imports Transformer Engine, which needs CUDA. Here Transformer
Engine is stood in for while Megatron-Bridge is imported, and only then: nothing that is built here
is made of it (``bridge.local_layer_spec``). Megatron-Core has to be imported before; it then knows
that Transformer Engine is missing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from capo_verl.plugin import bridge

ENGINE = "transformer_engine"


class _Layer(torch.nn.Module):
    """Base of what stands in for a class of Transformer Engine: to be inherited, never built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{type(self).__name__} of Transformer Engine cannot be built on a CPU")


class _Module(ModuleType):
    """Module in which every name exists: a class if it is capitalised, else a module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            value: Any = type(name, (_Layer,), {})
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != ENGINE:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]  # older than whatever is asked for


@contextmanager
def transformer_engine_stands_in() -> Iterator[None]:
    """Context in which ``transformer_engine`` can be imported where it is not installed."""
    if importlib.util.find_spec(ENGINE) is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        # Whoever looks later must find it missing.
        for name in [n for n in sys.modules if n.partition(".")[0] == ENGINE]:
            del sys.modules[name]


def import_megatron_bridge() -> None:
    """Import Megatron-Bridge, once.

    Raises:
        ValueError: if it, or what it imports, is not installed.
    """
    try:
        for name in ("megatron.core", "modelopt.torch"):  # they go without Transformer Engine
            importlib.import_module(name)
        with transformer_engine_stands_in():
            importlib.import_module("megatron.bridge")
            adapters: Any = importlib.import_module("megatron.bridge.peft.utils")
    except ImportError as error:
        raise ValueError(bridge.refusal(bridge.KEYS[0], str(error))) from error
    if importlib.util.find_spec(ENGINE) is None:
        adapters.HAVE_TE = False  # it takes what stands in for layers to put adapters on
