# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's random states, kept in the CPU generator.

Megatron-Core keeps one random state per kind of parallel region, forks it around initialization,
dropout and recomputation, and stores it in checkpoints. On a CPU verl skips the seeding
(``verl/workers/engine/megatron/utils.py:35``), and a tracker without states makes resuming fail
with a bare ``KeyError`` (``verl/utils/checkpoint/megatron_checkpoint_manager.py:844``). Two
functions reach the CUDA generator; everything else in ``megatron.core.tensor_parallel.random`` goes
through them or through ``torch.cuda`` (``torch_view.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import random as mcore_random


def _get_rng_state(
    device: Any = "cuda", clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def seed_model_parallel(seed: int) -> None:
    """Seed the tracker exactly as Megatron-Core does on a GPU.

    ``torch_view.redirect_cuda_to_cpu`` must have run.
    """
    mcore_random._get_cuda_rng_state = _get_rng_state
    mcore_random._set_cuda_rng_state = _set_rng_state
    mcore_random.model_parallel_cuda_manual_seed(seed)
