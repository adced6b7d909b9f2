# SPDX-License-Identifier: Apache-2.0
"""Seconds of every stage of a contender."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

from capo_verl.engines.timer import Timer

Name = TypeVar("Name", bound=Hashable)


def clock(device: str) -> str:
    """Clock that times calls on a device.

    With one thread the processor time of the process: other processes of the machine do not count.
    """
    if device == "cuda":
        return "CUDA events"
    return "processor time" if torch.get_num_threads() == 1 else "wall clock"


def measure_seconds(
    device: str, calls: Mapping[Name, Callable[[], Any]], repeats: int, limit: float
) -> dict[Name, list[float]]:
    """Run all calls in order, ``repeats`` times or until ``limit`` seconds have passed.

    They run at least once.

    Returns:
        Name of the call -> seconds of each repetition, by :func:`clock`.
    """
    timed = _processor_seconds if clock(device) == "processor time" else _timer_seconds
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    began = time.monotonic()
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(timed(device, call))
        if time.monotonic() - began > limit:
            break
    return seconds


def _processor_seconds(device: str, call: Callable[[], Any]) -> float:
    began = time.process_time()
    result = call()
    seconds = time.process_time() - began
    del result
    return seconds


def _timer_seconds(device: str, call: Callable[[], Any]) -> float:
    timer = Timer(torch.device(device))
    with timer.running():
        result = call()
    seconds = timer.seconds()
    del result
    return seconds
