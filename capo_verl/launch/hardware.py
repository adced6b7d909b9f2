# SPDX-License-Identifier: Apache-2.0
"""Memory of the GPU and of the machine that a run is planned for."""

from __future__ import annotations

import math
import os
import shutil
import subprocess

H100_80GB = 79.6
"""GiB that an H100-80GB reports (81,559 MiB)."""
RESERVE = 6.0
"""GiB per GPU for the CUDA context, NCCL's buffers, workspaces and fragmentation."""

VARIABLE = "GPU_MEMORY_GIB"
QUERY = ("--query-gpu=memory.total", "--format=csv,noheader,nounits")
SECONDS = 30


def machine_memory() -> float:
    """GiB of this machine."""
    import psutil

    return round(psutil.virtual_memory().total / (1 << 30), 1)


def gpu_memory(look: bool) -> tuple[float, list[str]]:
    """GiB of a GPU: ``GPU_MEMORY_GIB``, else of the smallest that ``CUDA_VISIBLE_DEVICES`` leaves,
    else of an H100-80GB.

    Args:
        look: whether this is the machine that the run is for.

    Returns:
        The memory, and notes.

    Raises:
        ValueError: if ``GPU_MEMORY_GIB`` is not a positive number.
    """
    given = os.environ.get(VARIABLE)
    if given:
        try:
            memory = float(given)
        except ValueError:
            memory = math.nan
        if not 0 < memory < math.inf:
            raise ValueError(f"{VARIABLE}={given}: set it to the GiB of one GPU, e.g. 79.6")
        return memory, []
    if not look:
        return H100_80GB, []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    sliced = "MIG-" in visible
    notes: list[str] = []
    memory = H100_80GB
    try:
        if shutil.which("nvidia-smi") is not None:
            # It tells the memory of whole GPUs only, not that of a slice.
            memory = _smallest("" if sliced else visible)
    except (OSError, subprocess.SubprocessError, ValueError) as e:
        reason = " ".join(str(e).split())
        notes = [
            f"nvidia-smi did not tell the GPUs' memory ({reason}): planned for {H100_80GB} GiB; "
            f"{VARIABLE} sets it"
        ]
    if sliced:
        notes = [
            f"CUDA_VISIBLE_DEVICES={visible} is a slice of a GPU, whose memory is not known: "
            f"planned for a whole GPU of {memory} GiB; {VARIABLE} sets it"
        ]
    return memory, notes


def _smallest(visible: str) -> float:
    """GiB of the smallest GPU among those named, or of all.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: if nvidia-smi does not tell it.
    """
    these = ("-i", visible) if visible else ()
    done = subprocess.run(
        ["nvidia-smi", *QUERY, *these], capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return round(
        min(float(line) for line in done.stdout.split("\n") if line.strip()) / 1024, 1
    )  # it counts in MiB
