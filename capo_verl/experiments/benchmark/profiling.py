# SPDX-License-Identifier: Apache-2.0
"""Time of a call by operator of torch, and on a CPU by function of the core as well."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

import torch

import capo_verl.core
from capo_verl.commands.measure import runner
from capo_verl.commands.measure.batch import make_batch
from capo_verl.commands.measure.contenders import KINDS
from capo_verl.commands.measure.workload import Workload

_CORE = PurePath(capo_verl.core.__file__).parent
_SHOWN = 15


def profiles(workload: Workload, tokens: int) -> dict[str, str]:
    """Key of every contender that runs here -> where its time goes."""
    batch, texts = make_batch(workload, tokens, seed=3), {}
    for kind in KINDS:
        if not (
            kind.missing(workload)
            or runner.needs(kind.tensor_bytes(workload, tokens), workload.device)
        ):
            texts[kind.key] = profile(workload.device, runner.warm(kind, workload).stages(batch))
    return texts


def profile(device: str, calls: Mapping[str, Callable[[], Any]]) -> str:
    """Run all calls twice (operators, functions) and return the tables as text."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    parts = []
    for name, call in calls.items():
        with torch.profiler.profile(activities=activities) as operators:
            call()
            if device == "cuda":
                torch.cuda.synchronize()
        order = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
        parts.append(
            f"{name}: operators\n" + operators.key_averages().table(sort_by=order, row_limit=_SHOWN)
        )
    if device == "cpu":  # on a GPU, functions return before their work is done
        for name, call in calls.items():
            parts.append(
                f"{name}: functions of capo_verl.core, seconds of processor time\n"
                + _functions(call)
            )
    return "\n".join(parts)


def _functions(call: Callable[[], Any]) -> str:
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(call)
    lines = [f"{'cumulative':>10} {'own':>8} {'calls':>7}  function"]
    found = []
    for (file, _, function), (_, calls, own, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        path = PurePath(file)
        if path.is_relative_to(_CORE):
            found.append(
                (
                    cumulative,
                    own,
                    calls,
                    f"{'.'.join(path.relative_to(_CORE).with_suffix('').parts)}.{function}",
                )
            )
    for cumulative, own, calls, function in sorted(found, reverse=True):
        lines.append(f"{cumulative:10.4f} {own:8.4f} {calls:7}  {function}")
    return "\n".join(lines) + "\n"
