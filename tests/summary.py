# SPDX-License-Identifier: Apache-2.0
"""What ``scripts/test.sh`` ran: versions, how each phase ended and how long it took, and why tests
were skipped.
"""

from __future__ import annotations

import platform
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "verl", "megatron-core", "transformers", "ray", "triton")
OUTCOMES = ("passed", "failed", "error", "skipped")


def versions() -> str:
    """Of Python and of what decides how tests go; no imports."""

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    return ", ".join([f"Python {platform.python_version()}", *map(of, PACKAGES)])


def outcomes(report: Path) -> tuple[Counter[str], Counter[str]]:
    """Of a JUnit report of pytest: tests by outcome, and skipped ones by reason."""
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag: child for child in case}
        outcome = next(
            (
                o
                for o, tag in (("failed", "failure"), ("error", "error"), ("skipped", "skipped"))
                if tag in kinds
            ),
            "passed",
        )
        counts[outcome] += 1
        if outcome == "skipped":
            reasons[kinds["skipped"].get("message", "no reason given")] += 1
    return counts, reasons


def summary(folder: Path) -> str:
    """The text.

    Args:
        folder: holds ``phases``, a line ``NAME<tab>EXIT CODE<tab>SECONDS`` for each that ran, and
            for those of pytest ``NAME.xml``.
    """
    lines, reasons = ["== what ran", versions()], Counter[str]()
    phases = folder / "phases"
    for line in phases.read_text().splitlines() if phases.exists() else []:
        name, code, seconds = line.split("\t")
        ended = "ok" if code == "0" else f"FAILED (exit code {code})"
        report = folder / f"{name}.xml"
        if report.exists():
            counts, skipped = outcomes(report)
            reasons += skipped
            ended += ": " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
        lines.append(f"{name}: {ended}, {seconds} s")
    lines += [f"skipped {count}: {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    print(summary(Path(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
