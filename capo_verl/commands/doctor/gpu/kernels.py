# SPDX-License-Identifier: Apache-2.0
"""Every kernel against float64, in memory that was filled with NaN."""

from __future__ import annotations

import importlib.util

import torch

from capo_verl.commands.doctor.check import FAIL, OK
from capo_verl.commands.doctor.deviations import (
    TOLERANCE,
    Inputs,
    Sizes,
    compare,
    exact,
    poisoned_memory,
    results,
)
from capo_verl.commands.doctor.gpu.rows import Row, not_run
from capo_verl.core.kernels import NAMES, choose

SIZES = {"cpu": (Sizes(),), "cuda": (Sizes(), Sizes(257, 20_011, 896), Sizes(256, 151_936, 128))}
"""The last has Qwen's vocabulary."""


def examine(device: torch.device) -> list[Row]:
    """Torch's and Triton's, which run in an interpreter on a CPU."""
    rows = []
    for name in NAMES:
        if name == "triton" and not importlib.util.find_spec("triton"):
            rows.append(not_run("kernels triton", "triton is not installed (pip install triton)"))
            continue
        found = {}
        for sizes in SIZES[device.type]:
            inputs = Inputs(sizes, device)
            with poisoned_memory():
                given = results(choose(device, name), inputs)
            what = f"{sizes.tokens} tokens, {sizes.rows} rows, {sizes.hidden} hidden units"
            for output, deviation in compare(given, exact(inputs)).items():
                found[f"{output} ({what})"] = deviation
        rows.append(_row(f"kernels {name}", found))
    return rows


def _row(name: str, found: dict[str, float]) -> Row:
    wrong = {output: x for output, x in found.items() if not x <= TOLERANCE}
    if wrong:
        listed = "; ".join(f"{output} by {x:.2g}" for output, x in wrong.items())
        return Row(name, FAIL, f"differ from float64 by more than {TOLERANCE:g}: {listed}")
    return Row(
        name,
        OK,
        f"equal float64: the largest of {len(found)} deviations is {max(found.values()):.1g}",
    )
