# SPDX-License-Identifier: Apache-2.0
"""Installed versions against the supported stacks."""

from __future__ import annotations

from collections.abc import Sequence

from capo_verl import __version__
from capo_verl.commands.doctor.check import OK, WARN, Outcome
from capo_verl.plugin import stack
from capo_verl.plugin.stack import Report

TOLD = ("verl", "torch", "megatron-core", "ray")
"""Versions that the message names."""


def versions(reports: Sequence[Report]) -> dict[str, str | None]:
    """Installed version of Python, of this project and of every package of a stack; None if
    missing.
    """
    found = {"python": reports[0].python.found, "capo-verl": __version__}
    return {**found, **{f.name: f.found for report in reports for f in report.packages}}


def compare(reports: Sequence[Report]) -> Outcome:
    """Compare; other versions are a warning: nobody has tested them, yet nothing need be broken."""
    complete = [report for report in reports if report.complete]
    if complete:
        installed = versions(reports)
        told = ", ".join(f"{name} {installed[name]}" for name in TOLD if installed.get(name))
        return Outcome(
            OK, f"the {' and '.join(report.stack for report in complete)} stack is complete: {told}"
        )
    here = next(report for report in reports if report.stack == stack.present())
    wrong = ", ".join(f"{f.name}{f.wanted} ({f.found or 'missing'})" for f in here.problems)
    return Outcome(
        WARN,
        f"other versions than the tested ones; of the {here.stack} stack, which is what is here, "
        f"differ {wrong}: scripts/check_stack.py --stack {here.stack} says how to install it",
    )


def table(reports: Sequence[Report]) -> str:
    """The packages of the stack that is here, if none is complete; else "": then the message says
    enough.
    """
    complete = any(report.complete for report in reports)
    return "" if complete else stack.render(reports, stack.present())
