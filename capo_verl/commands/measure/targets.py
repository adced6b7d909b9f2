# SPDX-License-Identifier: Apache-2.0
"""Targets of the filter, and their verdicts. All comparisons are within one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from capo_verl.commands.measure.results import Report, Result

_MIB = 1 << 20
FULL = 24576
"""Tokens of the authors' batch: 24 sequences of 1,024."""


@dataclass(frozen=True)
class Verdict:
    """One target of one run."""

    target: str
    measured: str
    met: bool


def judge_targets(report: Report) -> list[Verdict]:
    """The targets that this run can judge: those of its preset, at the sizes that were measured."""
    if report.sizes["tp"] != 1 or report.sizes["top_k"] != 50:
        return []
    if report.sizes["preset"] == "cpu-small" and report.environment["threads"] == 1:
        return _cpu(report)
    if report.sizes["preset"] == "qwen2.5-math-7b" and "H200" in str(
        report.environment["processor"]
    ):
        return _gpu(report)
    return []


def _cpu(report: Report) -> list[Verdict]:
    verdicts = []
    result = report.result("torch", 2048)
    if result and report.result("naive", 2048):
        verdicts += [
            _at_least(
                "evaluate, 2,048 tokens: times as fast as (a)", report.speedup(result), 4, "{:.2f}"
            ),
            _at_most(
                "extra memory, 2,048 tokens: share of (a)'s",
                report.memory_ratio(result),
                0.1,
                "{:.3f}",
            ),
        ]
    low, high = report.result("torch", 1024), report.result("torch", 65536)
    if low and high:
        growth = high.evaluate_scratch_bytes / max(low.evaluate_scratch_bytes, 1)
        verdicts.append(
            _at_most("evaluate's scratch memory: 65,536 over 1,024 tokens", growth, 1.1, "{:.2f}")
        )
    return verdicts


def _gpu(report: Report) -> list[Verdict]:
    result = report.result("triton", FULL)
    if not result:
        return []
    return [*judge_filter(report, result), *judge_speedup(report, result)]


def judge_filter(report: Report, result: Result) -> list[Verdict]:
    """The targets of a 7B model at ``FULL`` tokens; at others the times in proportion."""
    what, part = f"{result.tokens:,} tokens", result.tokens / FULL
    share = report.bandwidth(result)["evaluate"] / report.copy_bytes_per_second
    return [
        _at_most(f"evaluate, {what}: ms", result.evaluate_seconds * 1e3, 30 * part, "{:.3g}"),
        _at_most(
            f"accumulate + update, {what}: ms", result.update_seconds * 1e3, 20 * part, "{:.3g}"
        ),
        _at_most(f"extra memory, {what}: MiB", result.extra_bytes / _MIB, 256, "{:.0f}"),
        _at_least(f"evaluate, {what}: share of copy bandwidth", share, 0.4, "{:.2f}"),
    ]


def judge_speedup(report: Report, result: Result) -> list[Verdict]:
    """The target against (a); none if that was not measured."""
    speedup = report.speedup(result)
    if speedup is None:
        return []
    what = f"evaluate, {result.tokens:,} tokens: times as fast as (a)"
    return [_at_least(what, speedup, 50, "{:.1f}")]


def share_of_update(what: str, share: float, limit: float) -> Verdict:
    """A part of the update, as a share of its time; ``limit`` likewise."""
    return _at_most(f"{what}: % of the update", 100 * share, 100 * limit, "{:.2f}")


def _at_most(what: str, value: float | None, limit: float, show: str) -> Verdict:
    return _verdict(f"{what} <= {limit:g}", value, lambda x: x <= limit, show)


def _at_least(what: str, value: float | None, limit: float, show: str) -> Verdict:
    return _verdict(f"{what} >= {limit:g}", value, lambda x: x >= limit, show)


def _verdict(target: str, value: float | None, met: Callable[[float], bool], show: str) -> Verdict:
    assert value is not None
    return Verdict(target, show.format(value), met(value))
