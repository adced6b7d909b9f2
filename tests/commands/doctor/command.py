# SPDX-License-Identifier: Apache-2.0
"""The command as a user runs it, in an interpreter where something may have been broken before."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from tests.helpers import warm


def doctor(
    *arguments: str, before: str = "", interpreter: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """``capo-verl doctor ARGUMENTS``.

    Args:
        before: Python code that runs first, in the same process.
        interpreter: default: one that has imported the large packages.
    """
    code = (
        f"import sys\n{before}\nfrom capo_verl.commands.main import main\nsys.exit(main(['doctor', "
        "*sys.argv[1:]]))"
    )
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "VERL_USE_EXTERNAL_PLUGINS")
    }
    return subprocess.run(
        [interpreter or warm.python(), "-c", code, *arguments],
        env={**env, "VERL_PLATFORM": "cpu", **environment},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Check -> status and message, from the JSON."""
    found: dict[str, Any] = json.loads(done.stdout)
    return {row["name"]: (row["status"], row["message"]) for row in found["checks"]}
