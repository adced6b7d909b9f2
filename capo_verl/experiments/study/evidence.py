# SPDX-License-Identifier: Apache-2.0
"""The tables in ``docs/evidence.md`` and the figures beside it, from the packed results alone.

    python -m capo_verl.experiments.study.evidence [docs/evidence.md]

Between ``<!-- study NAME -->`` and ``<!-- end NAME -->`` the page's text is replaced by that
study's tables; what is written outside stays. A marker without results gets one sentence which says
so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from capo_verl.plugin.missing_packages import missing
from capo_verl.utils import replace_text

if TYPE_CHECKING:
    import pandas as pd

PAGE = Path(__file__).resolve().parents[3] / "docs" / "evidence.md"
SECTION = re.compile(r"(<!-- study (?P<name>[\w-]+) -->\n).*?(<!-- end (?P=name) -->)", re.DOTALL)


def render(page: str, runs: pd.DataFrame, curves: pd.DataFrame) -> str:
    """The page with its tables.

    Args:
        runs, curves: as packed by :func:`capo_verl.experiments.study.frame.pack`.
    """
    from capo_verl.experiments.study.tables import frame_tables

    def section(match: re.Match[str]) -> str:
        frame = runs[runs["study"] == match["name"]] if not runs.empty else runs
        if frame.empty:
            return f"{match[1]}\nNo results yet.\n\n{match[3]}"
        text = frame_tables(frame, curves[curves["run_id"].isin(frame["run_id"])])
        return f"{match[1]}\n{text}\n{match[3]}"

    return SECTION.sub(section, page)


def draw(runs: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """All figures of the studies that have results: ``STUDY-KIND.png`` and ``.svg``.

    Returns the PNGs.
    """
    from capo_verl.experiments.study import figures
    from capo_verl.experiments.study.frame import ordered

    made: list[Path] = []

    def add(name: str, kind: str, draw_: Callable[[Path], None]) -> None:
        path = folder / f"{name}-{kind}.png"
        draw_(path)
        made.append(path)

    for name, frame in runs.groupby("study", sort=True):
        frame = ordered(frame)
        mine = curves[curves["run_id"].isin(frame["run_id"])]
        rates = sorted(frame["lr"].unique())
        if any("." in axis for cell in frame["cell"] for axis in json.loads(cell)):
            add(name, "knobs", lambda p, f=frame: figures.sensitivity(f, p))
            continue
        if len(rates) > 2:
            add(name, "rates", lambda p, f=frame: figures.over_learning_rate(f, p))
        # A rate that suits the control, and one that is too fast.
        shown = [rates[len(rates) // 3], rates[-2]] if len(rates) > 3 else rates
        if frame["method"].nunique() <= 12:
            add(
                name,
                "curves",
                lambda p, f=frame, c=mine, r=shown: figures.learning_curves(f, c, r, p),
            )
        if len(rates) > 2 and "mean_scale" in frame and frame["mean_scale"].min() < 0.99:
            add(name, "scale", lambda p, f=frame, c=mine: figures.scale_found(f, c, p))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and figures; the exit code."""
    parser = argparse.ArgumentParser(
        prog="capo_verl.experiments.study.evidence",
        description="Rewrite the page's tables and figures.",
    )
    parser.add_argument(
        "page", nargs="?", type=Path, default=PAGE, help="default: docs/evidence.md of the checkout"
    )
    page = parser.parse_args(argv).page
    if not page.exists():
        print(f"{page} is missing: run in a checkout, or name the page", file=sys.stderr)
        return 2
    try:
        return _write(page)
    except ImportError as error:
        print(missing("capo_verl.experiments.study.evidence", error, "study"), file=sys.stderr)
        return 2


def _write(page: Path) -> int:
    from capo_verl.experiments.study.store import CURVES, RUNS, read

    folder = page.with_suffix("")
    runs, curves = read(folder / RUNS), read(folder / CURVES)
    if runs.empty:
        print(
            f"{folder / RUNS} is missing: capo_verl.experiments.study pack writes it",
            file=sys.stderr,
        )
        return 2
    replace_text(page, render(page.read_text(encoding="utf-8"), runs, curves))
    for path in draw(runs, curves, folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
