# SPDX-License-Identifier: Apache-2.0
"""What ``scripts/test_gpu_stack.sh`` would run, and what it writes."""

from __future__ import annotations

import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests import gpu_stack
from tests.gpu_stack import MEGATRON_CORES, PARTS, Run, merged, planned

ROOT = Path(__file__).parents[2]
OLDEST, NEWEST = MEGATRON_CORES
MBRIDGE = Run("engines/megatron", OLDEST, "mbridge", 7, 0, 1, 60, "2026-11-30", "1234567")
VERSIONS = {"torch": "2.11.0"}


def test_every_path_exists() -> None:
    paths = [path for part in PARTS.values() for path in part.paths]
    assert [
        p for p in paths if not (ROOT / "tests" / p.replace("--ignore=tests/", "")).exists()
    ] == []


def test_engines_of_megatron_run_with_each_version_through_each_bridge() -> None:
    both = [("engines/megatron", "mbridge"), ("engines/megatron", "megatron-bridge")]
    assert planned(["engines/megatron", "core"], OLDEST) == [("core", "-"), *both]
    assert planned(["engines/megatron", "core"], NEWEST) == both
    assert {folder for folder, _ in planned([], OLDEST)} == set(PARTS)


def test_an_unknown_folder_is_named() -> None:
    with pytest.raises(ValueError, match="^engine is none of core, core/kernels, cpu, "):
        planned(["engine"], OLDEST)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"passed": 8}, False),
        ({"megatron_core": NEWEST}, True),
        ({"bridge": "megatron-bridge"}, True),
        ({"folder": "core", "bridge": "-"}, True),
    ],
    ids=str,
)
def test_a_run_replaces_its_own_line_only(change, kept) -> None:
    new = replace(MBRIDGE, **change)
    old = {"versions": VERSIONS, "runs": [asdict(MBRIDGE)]}
    lines = merged(old, [new], VERSIONS)["runs"]
    assert asdict(new) in lines
    assert (asdict(MBRIDGE) in lines) is kept and len(lines) == 1 + kept


def test_without_megatron_the_version_does_not_matter() -> None:
    old = replace(MBRIDGE, folder="core", bridge="-")
    new = replace(old, megatron_core=NEWEST)
    document = merged({"versions": VERSIONS, "runs": [asdict(old)]}, [new], VERSIONS)
    assert document["runs"] == [asdict(new)]


def test_runs_of_other_versions_are_dropped() -> None:
    old = {"versions": {"torch": "2.10.0"}, "runs": [asdict(MBRIDGE)]}
    new = replace(MBRIDGE, bridge="megatron-bridge")
    document = merged(old, [new], VERSIONS)
    assert (document["versions"], document["runs"]) == (VERSIONS, [asdict(new)])


def test_what_has_not_run_is_named() -> None:
    core = replace(MBRIDGE, folder="core", bridge="-")
    missing = merged(None, [MBRIDGE, core], VERSIONS)["not_run"]
    assert "core" not in missing and f"engines/megatron {OLDEST} mbridge" not in missing
    for line in ("engines/fsdp", f"plugin {NEWEST}", f"engines/megatron {NEWEST} mbridge"):
        assert line in missing
    assert len(missing) == len(planned([], OLDEST)) + len(planned([], NEWEST)) - 2


def test_outcomes_of_a_run_are_counted(tmp_path, monkeypatch) -> None:
    """A real pytest, on tests of which one passes, one fails, one is skipped and one breaks."""
    tests = tmp_path / "tests" / "sample"
    tests.mkdir(parents=True)
    (tests / "test_sample.py").write_text(
        "import os, pytest\n"
        "def test_bridge(): assert os.environ['CAPO_TEST_BRIDGE'] == 'megatron-bridge'\n"
        "def test_fails(): assert False\n"
        "@pytest.mark.skip(reason='why not')\n"
        "def test_skipped(): pass\n"
        "def test_breaks(missing): pass\n"
    )
    (tmp_path / "setup.cfg").write_text("[tool:pytest]\nmarkers =\n ray:\n slurm:\n e2e:\n")
    monkeypatch.setattr(gpu_stack, "ROOT", tmp_path)
    monkeypatch.setitem(PARTS, "sample", gpu_stack.Part(("sample",), True, True))
    line, reasons = gpu_stack.run("sample", "megatron-bridge")
    assert (line.folder, line.bridge) == ("sample", "megatron-bridge")
    assert (line.passed, line.failed, line.skipped) == (1, 2, 1)
    assert reasons == ["1: why not"]


@pytest.mark.parametrize(
    ("changed", "dirty"), [("docs/gpu_stack.json", False), ("setup.cfg", True)]
)
def test_results_do_not_make_a_commit_dirty(tmp_path, monkeypatch, changed, dirty) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("docs/gpu_stack.json", "setup.cfg"):
        (tmp_path / name).write_text("old")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (("init", "-q"), ("add", "."), (*author, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / changed).write_text("new")
    monkeypatch.setattr(gpu_stack, "ROOT", tmp_path)
    assert re.fullmatch(f"[0-9a-f]{{7}}{'-dirty' if dirty else ''}", gpu_stack.commit())


def test_every_package_is_pinned() -> None:
    lines = (ROOT / "scripts" / "gpu_stack.requirements.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert [line for line in packages if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    for needed in ("torch==2.11.0", "transformers==5.9.0", "verl==0.9.1", "triton==3.6.0"):
        assert needed in packages


def test_another_python_is_refused(tmp_path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.11.9\nexit 1\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "scripts/test_gpu_stack.sh"], cwd=ROOT, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "CAPO_VENV": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        f"{tmp_path} has Python 3.11.9: the GPU stack needs Python 3.12; set PYTHON to one, or "
        "CAPO_VENV to another folder.\n"
    )
