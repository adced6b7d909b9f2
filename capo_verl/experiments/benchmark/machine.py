# SPDX-License-Identifier: Apache-2.0
"""The machine that was measured on."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path

import torch

from capo_verl.experiments.benchmark.measure import clock, measure_seconds
from capo_verl.experiments.provenance import commit, processor

_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}


def environment(device: str) -> dict[str, str | int]:
    """Names and versions, for the record."""
    facts: dict[str, str | int] = {
        "processor": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "device": device,
        "clock": clock(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator": _allocator_settings() or "default",
        "commit": commit() or "unknown",
    }
    if device == "cuda":
        import triton

        facts |= {"cuda": torch.version.cuda or "none", "triton": triton.__version__}
    return facts


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written bytes both counted; median of ten."""
    n = _COPY_BYTES[device]
    source = torch.ones(n, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = measure_seconds(
        device, {"copy": lambda: target.copy_(source)}, repeats=10, limit=10.0
    )
    return 2 * n / statistics.median(seconds["copy"])


def free_bytes(device: str) -> int:
    """Memory that can still be allocated, without what only this process's cache holds."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no line MemAvailable: the benchmark needs Linux >= 3.14")


def _allocator_settings() -> str:
    """Settings of the C library's allocator.

    They decide how often large tensors are new to the system, which costs time on a CPU.
    """
    names = sorted(
        name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
    )
    return " ".join(f"{name}={os.environ[name]}" for name in names)
