# SPDX-License-Identifier: Apache-2.0
"""Independent random numbers for every purpose of a run, the same in every process."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator that depends on both arguments.

    Methods with the same seed see the same prompts and random numbers.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
