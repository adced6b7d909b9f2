# SPDX-License-Identifier: Apache-2.0
"""``results/study.md`` and the figures beside it, from the packed results alone.

    python -m capo_verl.experiments.study.evidence [FOLDER]

The folder holds ``runs.parquet`` and ``curves.parquet``, as ``capo_verl.experiments.study pack``
writes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from capo_verl.plugin.missing_packages import missing
from capo_verl.utils import replace_text

if TYPE_CHECKING:
    import pandas as pd

RESULTS = Path(__file__).resolve().parents[1] / "results"
PAGE = "study.md"
HEAD = """# Studies: all tables and figures

Written by `python -m capo_verl.experiments.study.evidence` from `runs.parquet` and
`curves.parquet`. [docs/evidence.md](../../../docs/evidence.md) says what was measured, what the
marks mean and what follows.
"""
CAPTIONS = {
    "knobs": "Final accuracy over each knob",
    "rates": "Final accuracy over the learning rate",
    "curves": "Accuracy over completions",
    "scale": "The scale that the budget found",
}


def render(runs: pd.DataFrame, curves: pd.DataFrame) -> str:
    """The page: of every study its figures and tables.

    Args:
        runs, curves: as packed by :func:`capo_verl.experiments.study.frame.pack`.
    """
    from capo_verl.experiments.study.tables import frame_tables
    from capo_verl.experiments.wrap import wrapped

    parts = [HEAD]
    for name, frame in runs.groupby("study", sort=True):
        mine = curves[curves["run_id"].isin(frame["run_id"])]
        shown = [f"![{name}: {CAPTIONS[kind]}]({name}-{kind}.png)" for kind, _ in _figures(frame)]
        title, tables = frame_tables(frame, mine).split("\n", 1)
        parts.append("\n".join([title.removeprefix("#"), "", *shown, tables]))
    return wrapped("\n".join(parts))


def draw(runs: pd.DataFrame, curves: pd.DataFrame, folder: Path) -> list[Path]:
    """All figures of the studies that have results: ``STUDY-KIND.png`` and ``.svg``.

    Returns the PNGs.
    """
    from capo_verl.experiments.study.frame import ordered

    made: list[Path] = []
    for name, frame in runs.groupby("study", sort=True):
        mine = curves[curves["run_id"].isin(frame["run_id"])]
        for kind, draw_one in _figures(frame):
            path = folder / f"{name}-{kind}.png"
            draw_one(ordered(frame), mine, path)
            made.append(path)
    return made


def _figures(
    frame: pd.DataFrame,
) -> Iterator[tuple[str, Callable[[pd.DataFrame, pd.DataFrame, Path], None]]]:
    """The kinds of figure that a study has, and what draws each from runs and curves."""
    from capo_verl.experiments.study import figures

    rates = sorted(frame["lr"].unique())
    if any("." in axis for cell in frame["cell"] for axis in json.loads(cell)):
        yield "knobs", lambda runs, _, path: figures.sensitivity(runs, path)
        return
    if len(rates) > 2:
        yield "rates", lambda runs, _, path: figures.over_learning_rate(runs, path)
    # A rate that suits the control, and one that is too fast.
    shown = [rates[len(rates) // 3], rates[-2]] if len(rates) > 3 else rates
    if frame["method"].nunique() <= 12:
        yield (
            "curves",
            lambda runs, curves, path: figures.learning_curves(runs, curves, shown, path),
        )
    if len(rates) > 2 and "mean_scale" in frame and frame["mean_scale"].min() < 0.99:
        yield "scale", figures.scale_found


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables and figures; the exit code."""
    parser = argparse.ArgumentParser(
        prog="capo_verl.experiments.study.evidence",
        description="Rewrite the page of all tables, and the figures beside it.",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=RESULTS,
        help="of the packed results; default: those of the checkout",
    )
    try:
        return _write(parser.parse_args(argv).folder)
    except ImportError as error:
        print(missing("capo_verl.experiments.study.evidence", error, "study"), file=sys.stderr)
        return 2


def _write(folder: Path) -> int:
    from capo_verl.experiments.study.store import CURVES, RUNS, read

    runs, curves = read(folder / RUNS), read(folder / CURVES)
    if runs.empty:
        print(
            f"{folder / RUNS} is missing: capo_verl.experiments.study pack writes it",
            file=sys.stderr,
        )
        return 2
    replace_text(folder / PAGE, render(runs, curves))
    for path in draw(runs, curves, folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
