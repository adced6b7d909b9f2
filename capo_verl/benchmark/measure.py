# SPDX-License-Identifier: Apache-2.0
"""Seconds of every stage of a contender: CUDA events on a GPU, the wall clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from capo_verl.stopwatch import Stopwatch


def measure_seconds(
    device: str, calls: Mapping[str, Callable[[], Any]], repeats: int, limit: float
) -> dict[str, list[float]]:
    """Run all calls in order, ``repeats`` times; fewer (at least once) when ``limit`` seconds have passed.

    Returns:
        Name of the call -> seconds of each repetition.
    """
    stopwatch = Stopwatch(torch.device(device))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.monotonic()
    for _ in range(repeats):
        for name, call in calls.items():
            stopwatch.reset()
            with stopwatch.running():
                result = call()
            seconds[name].append(stopwatch.seconds())
            del result
        if time.monotonic() - began > limit:
            break
    return seconds
