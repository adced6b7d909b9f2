# SPDX-License-Identifier: Apache-2.0
"""Limits of scratch memory for one pass, and the cutting of work so that it does not grow with the
number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def scratch_elements(device: torch.device) -> int:
    """Elements of the largest temporary: small enough to stay in a CPU's cache, large enough to
    fill a GPU.
    """
    return 1 << 17 if device.type == "cpu" else 1 << 23


def block_tokens(device: torch.device) -> int:
    """Tokens evaluated at a time: few on a CPU, all of a usual micro-batch on a GPU."""
    return 1 << 10 if device.type == "cpu" else 1 << 15


def chunk_slices(n: int, size: int) -> Iterator[slice]:
    """``0..n`` in slices of ``size``; none if n is 0."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
