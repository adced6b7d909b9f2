# SPDX-License-Identifier: Apache-2.0
"""Provenance of measured numbers: the source tree and the processor."""

from __future__ import annotations

import platform
import subprocess
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@lru_cache
def commit(root: Path = ROOT) -> str:
    """Short hash of the checkout at ``root``, with ``+`` if the package differs from it.

    It is empty where there is no commit.
    """
    if not (root / ".git").exists():  # an installed package may lie in somebody else's repository
        return ""

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(root), *arguments)
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()

    head = git("rev-parse", "--verify", "--quiet", "--short=12", "HEAD")
    return head + (
        "+"
        if head and git("status", "--porcelain", "--untracked-files=no", "--", "capo_verl")
        else ""
    )


def processor() -> str:
    """Model name of the CPU, without its trademark signs."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].replace("(R)", "").replace("(TM)", "").split())
    return platform.processor() or platform.machine()
