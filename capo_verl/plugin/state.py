# SPDX-License-Identifier: Apache-2.0
"""State of the plugin in this process: failed registrations, and the platform."""

from __future__ import annotations

import os
import sys

ENTRY_POINT = "capo_verl.plugin.register"
"""Module that verl imports in the driver and in every worker."""

FAILURES: dict[str, Exception] = {}
"""Registrations that failed in this process, with their errors."""

REFUSED = 2
"""Exit code of a run, or of a command, that was refused before it started.

Another try would be refused as well.
"""


def on_cpu() -> bool:
    """True if the embedded CPU default is selected (``VERL_PLATFORM=cpu``)."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def raise_if_broken() -> None:
    """Refuse to go on where CAPO would be left out in silence.

    Raises:
        RuntimeError: naming what failed to register and why, or that verl has not loaded the
            plugin.
    """
    if ENTRY_POINT not in sys.modules:
        raise RuntimeError(
            f"verl has not loaded {ENTRY_POINT}: install capo_verl again (pip install .), for its "
            "entry point"
        )
    if FAILURES:
        reasons = "; ".join(f"{what}: {type(e).__name__}: {e}" for what, e in FAILURES.items())
        raise RuntimeError(
            f"capo_verl could not register with verl ({reasons}); `capo-verl doctor` tells more"
        )


def refusal(error: BaseException) -> str:
    """One line for an error that says what to change."""
    return f"capo_verl: refused before start: {' '.join(str(error).split())}"
