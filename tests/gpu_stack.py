# SPDX-License-Identifier: Apache-2.0
"""The tests with the versions of verl's GPU stack, on a CPU: ``scripts/test_gpu_stack.sh``.

``python -m tests.gpu_stack [FOLDER...]`` runs in that environment, with the Megatron-Core that is
in it, and writes what passed into ``docs/gpu_stack.json``, from which ``docs/support_matrix.py``
makes a table. A run replaces its own lines of an earlier one only: folders may be run one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.helpers.bridge import BRIDGES, ENVIRONMENT
from tests.summary import outcomes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "gpu_stack.json"
MEGATRON_CORES = ("0.18.0", "0.19.2")
PACKAGES = ("torch", "transformers", "verl", "megatron-bridge", "mbridge", "triton", "numpy")
MARKS = "not ray and not slurm and not e2e"


@dataclass(frozen=True)
class Part:
    """Tests that run together.

    Args:
        paths: below ``tests/``, and further arguments of pytest.
        megatron: whether Megatron-Core takes part: they then run with each version of it.
        bridges: whether Megatron engines train in them: they then run through each bridge.
    """

    paths: tuple[str, ...]
    megatron: bool = False
    bridges: bool = False


PARTS = {
    "core": Part(("core", "--ignore=tests/core/kernels")),
    "core/kernels": Part(("core/kernels",)),
    "cpu": Part(("cpu", "--ignore=tests/cpu/megatron")),
    "cpu/megatron": Part(("cpu/megatron",), megatron=True, bridges=True),
    "engines": Part(("engines", "--ignore=tests/engines/megatron", "--ignore=tests/engines/fsdp")),
    "engines/fsdp": Part(("engines/fsdp",)),
    "engines/megatron": Part(
        (
            "engines/megatron",
            "--ignore=tests/engines/megatron/test_layouts.py",
            "--ignore=tests/engines/megatron/test_bridges.py",
        ),
        megatron=True,
        bridges=True,
    ),
    "engines/megatron/test_layouts.py": Part(
        ("engines/megatron/test_layouts.py",), megatron=True, bridges=True
    ),
    "engines/megatron/test_bridges.py": Part(("engines/megatron/test_bridges.py",), megatron=True),
    "plugin": Part(("plugin",), megatron=True),
    "launch": Part(("launch",), megatron=True),
    "commands/doctor": Part(("commands/doctor",), megatron=True),
}
"""By folder of ``tests/``, without what has a part of its own; files that take long are apart."""


@dataclass(frozen=True)
class Run:
    """One line of the results."""

    folder: str
    megatron_core: str
    bridge: str
    """``-`` where no Megatron engine trains."""
    passed: int
    failed: int
    skipped: int
    seconds: int
    date: str
    commit: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later run of the same replaces; one version is enough where none takes part."""
        part = PARTS[self.folder]
        return self.folder, self.megatron_core if part.megatron else "-", self.bridge


def planned(folders: Sequence[str], megatron_core: str) -> list[tuple[str, str]]:
    """Folder and bridge of each run with a version of Megatron-Core; empty ``folders``: all.

    Raises:
        ValueError: for a folder that is none of ``PARTS``.
    """
    for folder in folders:
        if folder not in PARTS:
            raise ValueError(f"{folder} is none of {', '.join(PARTS)}")
    return [
        (folder, bridge)
        for folder, part in PARTS.items()
        if (not folders or folder in folders)
        and (part.megatron or megatron_core == MEGATRON_CORES[0])
        for bridge in (BRIDGES if part.bridges else ("-",))
    ]


def run(folder: str, bridge: str) -> tuple[Run, list[str]]:
    """Run the tests of a folder; also the outcome of each that did not pass or was skipped."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if bridge != "-":
        environment[ENVIRONMENT] = bridge
    paths = [p if p.startswith("-") else f"tests/{p}" for p in PARTS[folder].paths]
    with tempfile.TemporaryDirectory() as scratch:
        report, start = Path(scratch, "report.xml"), time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-m", MARKS, f"--junitxml={report}"]
        ended = subprocess.run([*command, *paths], cwd=ROOT, env=environment)
        if not report.exists():
            raise RuntimeError(f"pytest of tests/{folder} ended with {ended.returncode}")
        counts, reasons = outcomes(report)
    return Run(
        folder=folder,
        megatron_core=version("megatron-core"),
        bridge=bridge,
        passed=counts["passed"],
        failed=counts["failed"] + counts["error"],
        skipped=counts["skipped"],
        seconds=round(time.monotonic() - start),
        date=datetime.now(timezone.utc).date().isoformat(),
        commit=commit(),
    ), [f"{count}: {reason}" for reason, count in reasons.most_common()]


def commit() -> str:
    """The commit that was tested; ``-dirty`` with changes on top, other than of the results."""
    head = _git("rev-parse", "--short=7", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no", ":!docs/gpu_stack.json")
    return head + ("-dirty" if changes else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions that all runs of a file have in common."""
    return {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def merged(
    old: dict[str, Any] | None, new: Iterable[Run], having: dict[str, str]
) -> dict[str, Any]:
    """The file's contents with lines of new runs, and what has no line.

    Runs of other versions are dropped.
    """
    kept = [Run(**line) for line in old["runs"]] if old and old["versions"] == having else []
    by_key = {line.key: line for line in [*kept, *new]}
    order = {folder: at for at, folder in enumerate(PARTS)}
    lines = sorted(by_key.values(), key=lambda r: (order[r.folder], r.megatron_core, r.bridge))
    return {
        "versions": having,
        "runs": [asdict(line) for line in lines],
        "not_run": not_run(set(by_key)),
    }


def not_run(done: set[tuple[str, str, str]]) -> list[str]:
    """What a whole run would add: folder, with version and bridge where these matter."""
    keys = [
        (folder, megatron_core if PARTS[folder].megatron else "-", bridge)
        for megatron_core in MEGATRON_CORES
        for folder, bridge in planned([], megatron_core)
    ]
    return [" ".join(part for part in key if part != "-") for key in keys if key not in done]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for with the installed Megatron-Core; 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_stack", description=__doc__)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help=", ".join(PARTS))
    parser.add_argument("--bridge", choices=BRIDGES, help="only this one")
    args = parser.parse_args(argv)
    try:
        plan = planned(args.folders, version("megatron-core"))
    except ValueError as error:
        parser.error(str(error))
    failed = 0
    for folder, bridge in plan:
        if args.bridge and bridge not in ("-", args.bridge):
            continue
        line, reasons = run(folder, bridge)
        failed += line.failed
        old = json.loads(RESULTS.read_text()) if RESULTS.exists() else None
        RESULTS.write_text(json.dumps(merged(old, [line], versions()), indent=1) + "\n")
        print(line, *reasons, sep="\n  ", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
