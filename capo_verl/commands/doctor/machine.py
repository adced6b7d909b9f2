# SPDX-License-Identifier: Apache-2.0
"""The machine this runs on."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from capo_verl.launch.gpu_memory import SECONDS, gpu_memory
from capo_verl.launch.plan import GIB
from capo_verl.launch.plan_cli import machine_memory


@dataclass(frozen=True)
class Here:
    """Sizes in GiB."""

    gpus: int
    """That torch may use (``CUDA_VISIBLE_DEVICES``)."""
    gpu_memory: float
    """Of the smallest GPU, of ``GPU_MEMORY_GIB``, or, where neither is, of an H100-80GB."""
    gpu_free: float | None
    """Of the fullest GPU; None if ``nvidia-smi`` does not tell."""
    memory: float
    """Of the host."""
    memory_free: float
    """Of the host, that can be taken now."""


def look() -> Here:
    """
    Raises:
        ValueError: if ``GPU_MEMORY_GIB`` is not a positive number.
    """
    import psutil
    import torch

    memory, _ = gpu_memory(look=True)
    free = round(psutil.virtual_memory().available / GIB, 1)
    return Here(torch.cuda.device_count(), memory, _gpu_free(), machine_memory(), free)


def _gpu_free() -> float | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS)
    numbers = [line for line in done.stdout.split("\n") if line.strip().isdecimal()]
    return (
        min(int(number) for number in numbers) / 1024 if done.returncode == 0 and numbers else None
    )  # it counts in MiB
