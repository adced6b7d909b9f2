# SPDX-License-Identifier: Apache-2.0
"""Memory of a sequence of calls, exact to the byte.

It counts every allocation of torch, also those inside its operators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_MARK = "capo_verl.experiments.benchmark: "


@dataclass(frozen=True)
class Usage:
    """Bytes beyond those allocated before the first call."""

    peak: int
    """The most at any time during the call."""
    held: int
    """Bytes at its end, its result included."""


def measure_memory(device: str, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Usage]:
    """Run the calls in order, keeping their results alive until the last has returned.

    On a GPU these are the numbers of the caching allocator. On a CPU they are the profiler's record
    of the allocator; buffers which operators take from the C library directly, such as a sort's, do
    not pass through it.
    """
    return _on_gpu(calls) if device == "cuda" else _on_cpu(calls)


def scratch(before: int, usage: Usage) -> int:
    """Bytes needed temporarily: beyond what is held ``before`` the call and at its end."""
    return usage.peak - max(before, usage.held)


def _on_gpu(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Usage]:
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    usage, results = {}, []
    for name, call in calls.items():
        torch.cuda.reset_peak_memory_stats()
        results.append(call())
        torch.cuda.synchronize()
        usage[name] = Usage(
            torch.cuda.max_memory_allocated() - start, torch.cuda.memory_allocated() - start
        )
    return usage


def _on_cpu(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Usage]:
    results = []
    # One profile for all calls: only then does it know the size of what a later call frees.
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        for name, call in calls.items():
            with torch.autograd.profiler.record_function(_MARK + name):
                results.append(call())
    events = profile.kineto_results.events()
    ends = {e.name().removeprefix(_MARK): e.end_ns() for e in events if e.name().startswith(_MARK)}
    changes = sorted(
        ((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"),
        key=lambda change: change[0],
    )
    usage, now, at = {}, 0, 0
    for name in calls:
        peak = now
        while at < len(changes) and changes[at][0] <= ends[name]:
            now += changes[at][1]
            peak = max(peak, now)
            at += 1
        usage[name] = Usage(peak, now)
    return usage
