# SPDX-License-Identifier: Apache-2.0
"""A check, and what it may find; none hides the others."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

OK, WARN, FAIL, SKIPPED = "ok", "warn", "FAIL", "skipped"
STATUSES = (FAIL, WARN, SKIPPED, OK)
"""Worst first."""


class Broken(Exception):
    """Something will not work. The message is one sentence that says what to do."""


@dataclass(frozen=True)
class Outcome:
    """The finding of a check."""

    status: str
    """One of ``STATUSES``."""
    message: str
    """One sentence; unless the status is ``ok`` it says what to do."""


@dataclass(frozen=True)
class Check:
    """Something to look at."""

    name: str
    look: Callable[[], Outcome]
    """May raise :class:`Broken`."""
    remedy: str
    """Advice for when ``look`` ends with any other exception."""


@dataclass(frozen=True)
class Result:
    """A check that was made."""

    name: str
    status: str
    message: str
    seconds: float
    """Time that it was waited for."""


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send standard output, which belongs to the report, to standard error.

    Both Python's ``sys.stdout`` and the file descriptor, which C libraries and child processes
    write to.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def one_line(error: BaseException) -> str:
    """Type and message of an exception, on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def perform(check: Check) -> Result:
    """Make one check; whatever it raises is a failure of this check alone."""
    start = time.monotonic()
    try:
        with stdout_to_stderr():
            outcome = check.look()
    except Broken as e:
        outcome = Outcome(FAIL, str(e))
    except Exception as e:
        outcome = Outcome(FAIL, f"{one_line(e)}; {check.remedy}")
    return Result(check.name, outcome.status, outcome.message, round(time.monotonic() - start, 1))
