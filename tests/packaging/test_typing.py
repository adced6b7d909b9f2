# SPDX-License-Identifier: Apache-2.0
"""py.typed keeps its promise: a strict type checker sees the public API through the installed
wheel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

CONSUMER = Path(__file__).with_name("consumer.py")


def test_a_consumer_is_checked_strictly(installed, tmp_path):
    shutil.copy(CONSUMER, tmp_path)  # away from the checkout, which mypy would find first
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(installed.python),
            "--config-file", "",
         "--cache-dir", str(tmp_path / "cache"), "consumer.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "Success: no issues found in 1 source file\n", done.stdout + done.stderr
