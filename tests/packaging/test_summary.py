# SPDX-License-Identifier: Apache-2.0
"""What CI prints at the end, from real reports of pytest and from what scripts/test.sh notes."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

from tests.packaging.conftest import ROOT
from tests.summary import outcomes, summary, versions

TESTS = """
import pytest

@pytest.fixture
def broken():
    raise RuntimeError

def test_a(): pass
def test_b(): assert False
def test_c(broken): pass
@pytest.mark.parametrize("n", [1, 2])
def test_d(n): pytest.skip("no GPU")
def test_e(): pytest.importorskip("no_such_module", reason="needs no_such_module")
"""


def report(folder: Path, name: str) -> None:
    (folder / "test_x.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--junitxml={folder / name}.xml",
        "test_x.py",
    ]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1


def test_counts_and_reasons(tmp_path):
    report(tmp_path, "pytest: x")
    counts, reasons = outcomes(tmp_path / "pytest: x.xml")
    assert counts == {"passed": 1, "failed": 1, "error": 1, "skipped": 3}
    assert reasons == {"no GPU": 2, "needs no_such_module": 1}


def test_the_text(tmp_path):
    report(tmp_path, "pytest: one")
    (tmp_path / "phases").write_text("ruff\t0\t3\npytest: one\t1\t60\npytest: two\t137\t5\n")
    assert summary(tmp_path).splitlines() == [
        "== what ran",
        versions(),
        "ruff: ok, 3 s",
        "pytest: one: FAILED (exit code 1): 1 passed, 1 failed, 1 error, 3 skipped, 60 s",
        "pytest: two: FAILED (exit code 137), 5 s",
        "skipped 2: no GPU",
        "skipped 1: needs no_such_module",
    ]


def test_versions_are_the_installed_ones(monkeypatch):
    text = versions()
    assert text.startswith(
        f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}, verl "
    )
    monkeypatch.setattr("tests.summary.PACKAGES", ("no-such-package",))
    assert versions() == f"Python {platform.python_version()}, no no-such-package"


def test_the_script_prints_it_also_when_a_phase_fails(tmp_path):
    """The script itself, with stand-ins for what it calls: the first failure ends it, and the
    summary comes all the same.
    """
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, code in {"ruff": 0, "mypy": 3}.items():
        (commands / name).write_text(f"#!/bin/sh\necho {name} called\nexit {code}\n")
        (commands / name).chmod(0o755)
    (commands / "python").symlink_to(sys.executable)
    environment = {
        "PATH": "/usr/bin:/bin",
        "CAPO_VENV": str(tmp_path),
        "CAPO_SKIP_INSTALL": "1",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run(
        ["bash", "scripts/test.sh"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 3
    lines = done.stdout.splitlines()
    assert lines[:5] == ["== ruff", "ruff called", "ruff called", "== mypy", "mypy called"]
    assert lines[5:7] == ["== what ran", versions()]
    assert [line.rpartition(",")[0] for line in lines[7:]] == [
        "ruff: ok",
        "mypy: FAILED (exit code 3)",
    ]
