# SPDX-License-Identifier: Apache-2.0
"""The report: a row per check for people, one object for programs."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from capo_verl.commands.doctor.check import FAIL, OK, SKIPPED, STATUSES, WARN, Result
from capo_verl.commands.doctor.software import versions
from capo_verl.plugin.stack import Report

NAME_WIDTH = 22


def overall(results: Sequence[Result]) -> str:
    """``FAIL`` or ``warn`` if any check says so, else ``ok``: what was skipped is no verdict."""
    found = {result.status for result in results}
    worst = next((status for status in STATUSES if status in found), OK)
    return worst if worst in STATUSES[:2] else OK


def exit_code(results: Sequence[Result]) -> int:
    """1 if anything is broken, else 0."""
    return int(overall(results) == FAIL)


def platform() -> str | None:
    """``VERL_PLATFORM``; None leaves the choice to verl."""
    return os.environ.get("VERL_PLATFORM") or None


def row(result: Result) -> str:
    """One check; on a terminal long messages are wrapped, elsewhere they stay on their line."""
    head = f"{result.status:<8}{result.name:<{NAME_WIDTH}}"
    if not sys.stdout.isatty():
        return head + result.message
    width = max(shutil.get_terminal_size().columns, len(head) + 40)
    lines = textwrap.wrap(
        result.message, width - len(head), break_long_words=False, break_on_hyphens=False
    )
    return head + ("\n" + " " * len(head)).join(lines)


def summary(results: Sequence[Result]) -> str:
    """Count of the checks that failed, and of what else is not plainly ok."""
    counts = {status: sum(result.status == status for result in results) for status in STATUSES}
    others = ", ".join(f"{counts[status]} {status}" for status in (WARN, SKIPPED) if counts[status])
    verdict = (
        f"{counts[FAIL]} of {len(results)} checks failed"
        if counts[FAIL]
        else f"all {len(results)} checks passed"
    )
    return f"{verdict} ({others})" if others else verdict


def short(results: Sequence[Result]) -> str:
    """The targets that were missed, a line each; "" if none was."""
    failed = [f"  {result.name}: {result.message}" for result in results if result.status == FAIL]
    return "\n".join(["fell short:", *failed]) if failed else ""


def as_dict(
    results: Sequence[Result], reports: Sequence[Report], device: str | None = None
) -> dict[str, Any]:
    """The object that ``--json`` prints; its keys are described in ``docs/doctor.md``.

    Args:
        device: of ``--gpu``; None without.
    """
    of_gpu = {
        "device": device,
        "fell_short": [result.name for result in results if result.status == FAIL],
    }
    return {
        "status": overall(results),
        "platform": platform(),
        **({} if device is None else of_gpu),
        "checks": [asdict(result) for result in results],
        "versions": versions(reports),
        "stacks": [report.as_dict() for report in reports],
    }
