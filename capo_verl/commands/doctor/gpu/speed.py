# SPDX-License-Identifier: Apache-2.0
"""The filter at the sizes of a 7B model: the benchmark's targets, and its share of an update."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from capo_verl.commands.doctor.gpu.layer import update_seconds
from capo_verl.commands.doctor.gpu.rows import Row, judged, not_run
from capo_verl.commands.measure import runner
from capo_verl.commands.measure.contenders import FUSED, NAIVE, TORCH, Kind
from capo_verl.commands.measure.machine import free_bytes
from capo_verl.commands.measure.results import Report
from capo_verl.commands.measure.targets import (
    FULL,
    judge_filter,
    judge_speedup,
    share_of_update,
)
from capo_verl.commands.measure.workload import MOMENT_BYTES, PRESETS, Workload
from capo_verl.plugin.checks.model_shape import KNOWN, ModelShape

NAMES = ("filter evaluate", "filter update", "filter memory", "filter bandwidth")
SHARE = 0.01
"""Of an update that the filter may take."""
SLACK = 1 << 30


@dataclass(frozen=True)
class Setting:
    """Sizes of the measurement on a device."""

    shape: ModelShape
    kind: Kind
    sizes: tuple[int, ...]
    """Numbers of tokens, descending: the first that fits is taken."""
    sequences: int
    length: int
    """Of the batch on which a layer is timed."""

    def workload(self, device: torch.device, tokens: int) -> Workload:
        head = (self.shape.vocab, self.shape.hidden)
        name = next((name for name, sizes in PRESETS.items() if sizes == head), "rehearsal")
        return Workload(name, *head, 1, 50, (tokens,), device.type)


SETTINGS = {
    "cuda": Setting(
        KNOWN["qwen/qwen2.5-math-7b"], FUSED, (FULL, 16384, 12288, 8192, 4096, 2048, 1024, 512),
        4, 1024,
    ),
    "cpu": Setting(ModelShape("rehearsal", 2, 64, 4, 2, 16, 128, 2048), TORCH, (256,), 2, 64),
}  # fmt: skip


def examine(device: torch.device) -> list[Row]:
    """A GPU of 24 GB has no room for all tokens: then the times are judged in proportion."""
    setting = SETTINGS[device.type]
    tokens = _that_fit(setting, device)
    if not tokens:
        return [not_run("filter", f"{setting.sizes[-1]} tokens do not fit into the free memory")]
    report = _measure(setting, device, tokens, (setting.kind,))
    result = report.result(setting.kind.key, tokens)
    assert result is not None
    remark = (
        f" ({FULL:,} tokens do not fit: limits of times in proportion)"
        if tokens < setting.sizes[0]
        else ""
    )
    verdicts = judge_filter(report, result)
    rows = [judged(name, v, remark) for name, v in zip(NAMES, verdicts, strict=True)]
    rows.append(_speedup(setting, device))
    seconds = update_seconds(setting.shape, tokens, device, setting.sequences, setting.length)
    share = (result.evaluate_seconds + result.update_seconds) / seconds
    what = f"the filter, {tokens:,} tokens of {setting.shape.name}"
    computed = (
        f"; the update is computed, {seconds:.3g} s: {setting.shape.layers} times a layer's "
        "forward and backward pass, measured, and the LM head's"
    )
    rows.append(judged("filter share", share_of_update(what, share, SHARE), computed))
    return rows


def _measure(
    setting: Setting, device: torch.device, tokens: int, kinds: tuple[Kind, ...]
) -> Report:
    workload = setting.workload(device, tokens)
    return runner.run(workload, repeats=5, say=lambda _: None, kinds=kinds, compare=False)


def _speedup(setting: Setting, device: torch.device) -> Row:
    """Against the formulation as published, at the most tokens that this has room for."""
    name, tokens = "filter speedup", _that_fit(setting, device, NAIVE)
    if not tokens:
        return not_run(name, "the formulation as published does not fit into the free memory")
    report = _measure(setting, device, tokens, (NAIVE, setting.kind))
    result = report.result(setting.kind.key, tokens)
    verdicts = [] if result is None else judge_speedup(report, result)
    if not verdicts:
        skipped = "; ".join(r.skipped for r in report.results if r.skipped)
        return not_run(name, f"the formulation as published: {skipped}")
    fewer = " (more do not fit beside it)" if tokens < setting.sizes[0] else ""
    return judged(name, verdicts[0], fewer)


def _that_fit(setting: Setting, device: torch.device, other: Kind | None = None) -> int:
    """The most tokens that fit, beside another contender; 0 if none do."""
    moments = 2 * setting.shape.vocab * setting.shape.hidden * MOMENT_BYTES
    free = free_bytes(device.type) - SLACK - moments
    for tokens in setting.sizes:
        workload = setting.workload(device, tokens)
        needed = 1.2 * workload.input_bytes(tokens)
        if other is not None:
            sums = setting.shape.vocab * setting.shape.hidden * 4
            needed += 1.2 * other.tensor_bytes(workload, tokens) + moments + sums
        if needed <= free:
            return tokens
    return 0
