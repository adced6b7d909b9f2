# SPDX-License-Identifier: Apache-2.0
"""The machine this runs on."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

from capo_verl.launch.hardware import SECONDS, gpu_memory, machine_memory
from capo_verl.launch.plan import GIB


@dataclass(frozen=True)
class Machine:
    """Sizes in GiB."""

    gpus: int
    """GPUs that torch may use (``CUDA_VISIBLE_DEVICES``)."""
    gpu_memory: float
    """Memory of the smallest GPU, of ``GPU_MEMORY_GIB``, or, where neither is, of an H100-80GB."""
    gpu_free: float | None
    """Free memory of the fullest GPU; None if ``nvidia-smi`` does not tell."""
    memory: float
    """Memory of the host."""
    memory_free: float
    """Memory of the host that can be taken now."""


def look() -> Machine:
    """
    Raises:
        ValueError: if ``GPU_MEMORY_GIB`` is not a positive number.
    """
    import psutil
    import torch

    memory, _ = gpu_memory(look=True)
    free = round(psutil.virtual_memory().available / GIB, 1)
    return Machine(torch.cuda.device_count(), memory, _gpu_free(), machine_memory(), free)


def _gpu_free() -> float | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS)
    numbers = [line for line in done.stdout.split("\n") if line.strip().isdecimal()]
    return (
        min(int(number) for number in numbers) / 1024 if done.returncode == 0 and numbers else None
    )  # it counts in MiB
