# SPDX-License-Identifier: Apache-2.0
"""Which operations would make the host wait for a GPU, found on a machine without one.

What is recorded, with the reason in PyTorch's CUDA code:

* the host needs a value: ``item``, ``int()``, ``float()``, ``if``, slicing by a tensor
  (``_local_scalar_dense``), ``equal``, ``tolist``, ``numpy``, ``cpu``, ``to("cpu")``
* the size of the result depends on values, and is read back to allocate it: ``nonzero``,
  ``masked_select``, indexing by a bool or uint8 mask, ``unique*``, ``repeat_interleave`` without
  ``output_size``, ``bincount``, ``unbind`` of a jagged tensor
* a kernel checks its input on the host or works in rounds: ``multinomial``, ``mode``,
  ``embedding_renorm_``, ``searchsorted`` with a sorter, ``histc`` without bounds,
  ``segment_reduce`` unless ``unsafe``, factorisations
* data of the host go to the device from pageable memory, and the copy is waited for:
  ``torch.tensor``, ``as_tensor``, ``asarray``, ``new_tensor``, an index that is a list; a number
  assigned to one element (``x[0] = 1``) or at an index tensor (``x[index] = 1``). Not: a number
  assigned to a slice (``fill_``) or at a mask (``masked_fill_``)
* waiting itself: ``barrier``

What cannot be seen without a GPU: ``to(device)`` and ``copy_`` between host and device (from pinned
memory with ``non_blocking`` they do not wait), ``torch.cuda.synchronize``, ``Event.synchronize``,
the caching allocator when it frees memory, and what a library launches without PyTorch's
dispatcher. ``torch.cuda.set_sync_debug_mode("error")`` sees the copies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).resolve().parents[2] / "capo_verl"


class Sync(NamedTuple):
    """One operation that would wait."""

    operation: str
    where: str
    """Innermost line of the package that led there, ``core/metrics.py:57``; empty if none did."""


def _always(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return True


def _has_mask_index(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    indices = args[1] if len(args) > 1 else kwargs["indices"]
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _bounds_are_missing(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    low, high = (
        kwargs.get(name, args[at] if len(args) > at else 0) for name, at in (("min", 2), ("max", 3))
    )
    return low == high


OPERATIONS: dict[str, Callable[[Sequence[Any], dict[str, Any]], bool]] = {
    **dict.fromkeys(
        ("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select",
            "bincount", "_unique", "_unique2",
         "unique_dim", "unique_consecutive", "unique_dim_consecutive", "_coalesce",
         "multinomial", "mode", "embedding_renorm_", "linalg_cholesky_ex", "linalg_eigh",
         "_linalg_eigh", "_linalg_svd",
         "linalg_inv_ex", "_linalg_solve_ex", "linalg_lstsq", "linalg_lu_factor_ex", "barrier"),
        _always,
    ),
    **dict.fromkeys(("index", "index_put", "index_put_", "_index_put_impl_"), _has_mask_index),
    "repeat_interleave": lambda args,
    kwargs: kwargs.get("output_size", args[1] if len(args) > 1 else None) is None,
    "searchsorted": lambda args, kwargs: kwargs.get("sorter") is not None,
    "unbind": lambda args, kwargs: args[0].is_nested,
    "segment_reduce": lambda args, kwargs: not kwargs.get("unsafe", False),
    "histc": _bounds_are_missing,
}  # fmt: skip
"""Name of an ATen or c10d operation -> whether it waits when called like this."""

FUNCTIONS = frozenset(
    ("tolist", "numpy", "__array__", "cpu", "tensor", "as_tensor", "asarray", "new_tensor")
)
"""Python functions which on CPU tensors reach no operation that could be told from harmless ones.
"""


def _copies_to_the_host(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    targets = [*args[1:], *kwargs.values()] if name == "to" else []
    return any(isinstance(x, str | torch.device) and torch.device(x).type == "cpu" for x in targets)


def _copies_from_the_host(name: str, args: Sequence[Any]) -> bool:
    """An index that is a list; a number assigned to one element or at an index tensor."""
    if name not in ("__getitem__", "__setitem__"):
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(part, list | np.ndarray) for part in index):
        return True
    if not (name == "__setitem__" and isinstance(args[2], int | float)):
        return False
    if any(isinstance(part, Tensor) for part in index):
        return not _is_mask(index)
    return all(isinstance(part, int) for part in index) and len(index) == args[0].dim()


def _is_mask(index: Sequence[Any]) -> bool:
    """Masked assignment of a number becomes ``masked_fill_`` if there is one mask and no other
    index.
    """
    return (
        len(index) == 1
        and isinstance(index[0], Tensor)
        and index[0].dtype in (torch.bool, torch.uint8)
    )


def _where() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[Sync]):
        super().__init__()
        self._found = found
        self.quiet = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if not self.quiet and name in OPERATIONS and OPERATIONS[name](args, kwargs):
            self._found.append(Sync(name, _where()))
        return func(*args, **kwargs)


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[Sync], operations: _Operations):
        super().__init__()
        self._found, self._operations = found, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        hands_on = name in ("as_tensor", "asarray") and args and isinstance(args[0], Tensor)
        copies = _copies_to_the_host(name, args, kwargs) or _copies_from_the_host(name, args)
        if (name in FUNCTIONS and not hands_on) or copies:
            self._found.append(Sync(name, _where()))
        fills = name == "__setitem__" and isinstance(args[2], int | float) and not copies
        self._operations.quiet = fills
        try:
            return func(*args, **kwargs)
        finally:
            self._operations.quiet = False


@contextmanager
def recorded_syncs() -> Iterator[list[Sync]]:
    """The list of what would have waited inside the block, in order; empty if nothing would."""
    found: list[Sync] = []
    operations = _Operations(found)
    with _Functions(found, operations), operations:
        yield found
