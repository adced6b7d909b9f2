# SPDX-License-Identifier: Apache-2.0
"""Findings of a part, as its process hands them on."""

from __future__ import annotations

from typing import NamedTuple

from capo_verl.commands.doctor.check import FAIL, OK, SKIPPED
from capo_verl.commands.measure.targets import Verdict


class Row(NamedTuple):
    """One line of the table."""

    name: str
    status: str
    message: str


def judged(name: str, verdict: Verdict, remark: str = "") -> Row:
    """A target: ``FAIL`` if it was missed."""
    message = f"{verdict.target}, measured {verdict.measured}{remark}"
    return Row(name, OK if verdict.met else FAIL, message)


def not_run(name: str, reason: str) -> Row:
    """Lines that cannot be measured here."""
    return Row(name, SKIPPED, f"not run here: {reason}")
