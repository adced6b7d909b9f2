# SPDX-License-Identifier: Apache-2.0
"""``capo-verl plot RUN…``: pictures of runs from their logs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from capo_verl.commands.refusal import refuse
from capo_verl.viewer.notes import visible
from capo_verl.viewer.series import Run

AXES = ("steps", "completions", "accepted")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "plot",
        help="draw accuracy, rejection, shifts, KL and step scale of runs: PNG and SVG",
        description="Draw runs from their logs: verl's file logger, TensorBoard, wandb offline, or "
        "tables of capo_verl.experiments.study.",
        epilog="Example: capo-verl plot outputs/grpo outputs/capo --output figures",
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("figures"),
        help="folder of the pictures (default: figures)",
    )
    parser.add_argument(
        "--x",
        choices=AXES,
        help="x axis (default: completions where all runs have them, else steps)",
    )
    parser.set_defaults(run=run)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that ``plot`` and ``report`` share."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a log, or a folder with logs in or below it",
    )
    parser.add_argument(
        "--group-by",
        nargs="+",
        default=["seed"],
        metavar="KEY",
        help="runs whose configurations differ in these keys only become one curve with a band "
        "(default: seed)",
    )
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="only runs whose configuration says so, as in --where task=sort8 lr=1e-3 lr=3e-3",
    )


def run(args: argparse.Namespace) -> int:
    """Draw; 2 with one line about what is wrong."""
    try:
        from capo_verl.viewer.choose import choose
        from capo_verl.viewer.drawing import save_figures
        from capo_verl.viewer.groups import group_runs
        from capo_verl.viewer.load import load_runs
        from capo_verl.viewer.panels import choose_axis

        lost: list[str] = []
        runs = choose(load_runs(args.runs, lost.append), args.where)
        groups = group_runs(runs, args.group_by)
        written = save_figures(groups, choose_axis(runs, args.x), args.output)
    except (ValueError, OSError) as e:
        return refuse("plot", visible(str(e)))
    tell_notes("plot", runs, lost)
    for group in groups:
        print(visible(f"{group.label}: {', '.join(str(run.source) for run in group.runs)}"))
    print(visible(f"{len(written)} files in {args.output}; all panels: {written[0]}"))
    return 0


def tell_notes(command: str, runs: Iterable[Run], lost: Iterable[str]) -> None:
    """Print on standard error what of the runs is missing in what was written, a line each."""
    for note in (*lost, *(note for run in runs for note in run.notes)):
        print(visible(f"capo-verl {command}: note: {note}"), file=sys.stderr)
