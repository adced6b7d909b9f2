# SPDX-License-Identifier: Apache-2.0
"""Targets of the filter, and their verdicts. All comparisons are within one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from capo_verl.experiments.benchmark.results import Report

_MIB = 1 << 20


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
    result = report.result("triton", 24576)
    if not result:
        return []
    share = report.bandwidth(result)["evaluate"] / report.copy_bytes_per_second
    verdicts = [
        _at_most("evaluate, 24,576 tokens: ms", result.evaluate_seconds * 1e3, 30, "{:.1f}"),
        _at_most(
            "accumulate + update, 24,576 tokens: ms", result.update_seconds * 1e3, 20, "{:.1f}"
        ),
        _at_most("extra memory, 24,576 tokens: MiB", result.extra_bytes / _MIB, 256, "{:.0f}"),
        _at_least("evaluate, 24,576 tokens: share of copy bandwidth", share, 0.4, "{:.2f}"),
    ]
    speedup = report.speedup(result)
    if speedup is not None:
        verdicts.append(
            _at_least("evaluate, 24,576 tokens: times as fast as (a)", speedup, 50, "{:.1f}")
        )
    return verdicts


def _at_most(what: str, value: float | None, limit: float, show: str) -> Verdict:
    return _verdict(f"{what} <= {limit:g}", value, lambda x: x <= limit, show)


def _at_least(what: str, value: float | None, limit: float, show: str) -> Verdict:
    return _verdict(f"{what} >= {limit:g}", value, lambda x: x >= limit, show)


def _verdict(target: str, value: float | None, met: Callable[[float], bool], show: str) -> Verdict:
    assert value is not None
    return Verdict(target, show.format(value), met(value))
