# SPDX-License-Identifier: Apache-2.0
"""The parts, in their order, each in a process of its own: one that crashes, hangs, or leaves the
device in disorder is a failure of its own alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from capo_verl.commands.doctor.answering_process import AnsweringProcess
from capo_verl.commands.doctor.check import FAIL, Broken, Result
from capo_verl.commands.doctor.gpu.rows import Row

LEAST, LEAST_FREE = 22e9, 20e9
"""Bytes of a GPU that is sold as one of 24 GB, and of it those that have to be free."""


REHEARSAL = 600.0
"""Seconds that every part is given on a CPU, which may be busy."""


@dataclass(frozen=True)
class Part:
    """A function that takes the device and returns rows."""

    module: str
    function: str
    seconds: float
    """Time that it is given; of all parts less than ten minutes."""

    def examine(self) -> Callable[[torch.device], list[Row]]:
        module = importlib.import_module(f"capo_verl.commands.doctor.gpu.{self.module}")
        found: Callable[[torch.device], list[Row]] = getattr(module, self.function)
        return found


PARTS = {
    "kernels": Part("kernels", "examine", 110),
    "waits": Part("waits", "examine", 50),
    "filter": Part("speed", "examine", 140),
    "engine": Part("training", "examine_engine", 170),
    "KL budget": Part("training", "examine_budget", 110),
}


def refusal(device: str) -> str | None:
    """Why nothing can be examined on this machine; None if something can."""
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        without = "" if torch.version.cuda else ", built without CUDA,"
        return (
            f"--gpu: torch {torch.__version__}{without} finds no GPU here: run it where one is, or "
            "rehearse it with --device cpu"
        )
    if not importlib.util.find_spec("triton"):
        return "--gpu: triton, in which the kernels are written, is missing: pip install triton"
    name, (free, total) = torch.cuda.get_device_name(), torch.cuda.mem_get_info()
    if total < LEAST:
        return f"--gpu: {name} has {total / 1e9:.1f} GB: use a GPU of 24 GB at least"
    if free < LEAST_FREE:
        return (
            f"--gpu: of the {total / 1e9:.1f} GB of {name} only {free / 1e9:.1f} are free: end "
            "what else runs there"
        )
    return None


def describe(device: str) -> str:
    """The device, in words."""
    if device == "cpu":
        return "CPU: a rehearsal with small sizes; no figure below is a GPU's"
    total = torch.cuda.mem_get_info()[1]
    return f"{torch.cuda.get_device_name()}, {total / 1e9:.1f} GB"


def examine(device: str, tell: Callable[[Result], None]) -> list[Result]:
    """Examine all parts.

    Args:
        tell: is given each result as it is found.
    """
    results: list[Result] = []
    for name in PARTS:
        began = time.monotonic()
        rows = _answer(name, device)
        seconds = round(time.monotonic() - began, 1)
        for row in rows:
            results.append(Result(*row, seconds))
            tell(results[-1])
            seconds = 0.0  # of the part, told once
    return results


def _answer(name: str, device: str) -> list[Row]:
    try:
        with AnsweringProcess(
            "capo_verl.commands.doctor.gpu", name, device, environment=_environment(device)
        ) as child:
            limit = PARTS[name].seconds if device == "cuda" else REHEARSAL
            return [Row(*row) for row in child.answer(limit)]
    except Broken as e:
        return [Row(name, FAIL, f"it could not be examined: {e}")]


def _environment(device: str) -> dict[str, str]:
    """Of a part: nothing is fetched, and the platform is the device's."""
    dropped = ("VERL_PLATFORM", "TRITON_INTERPRET", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if device == "cpu":
        own = {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    else:
        own = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return {**kept, **offline, **ranks, **own}
