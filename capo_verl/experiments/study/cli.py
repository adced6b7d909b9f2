# SPDX-License-Identifier: Apache-2.0
"""Command line ``python -m capo_verl.experiments.study run|status|tables|pack``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

RESULTS = Path("outputs/study")
PACKED = Path("capo_verl/experiments/results")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code (1: a run failed, 2: bad input, 130: Ctrl-C)."""
    parser = argparse.ArgumentParser(prog="capo_verl.experiments.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is not finished yet")
    run.add_argument("study", type=Path, nargs="+", help="a study's YAML")
    run.add_argument("--jobs", type=int, default=1, help="worker processes, one thread each")
    run.add_argument("--cache", type=Path, help="folder of the warm starts")
    run.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="METHOD",
        help="of these methods (repeatable)",
    )
    run.add_argument("--limit", type=int, help="at most this many runs")
    run.add_argument("--keep-failed", action="store_true", help="do not try failed runs again")
    status = commands.add_parser("status", help="how far a study is")
    status.add_argument("study", type=Path, nargs="+")
    tables = commands.add_parser("tables", help="its tables, as markdown")
    tables.add_argument("study", type=Path, nargs="+")
    pack = commands.add_parser("pack", help="merge results into one small file for the repository")
    pack.add_argument("study", type=Path, nargs="+")
    pack.add_argument("--output", type=Path, default=PACKED, help=f"default: {PACKED}")
    for command in (run, status, tables, pack):
        command.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args(arguments)
    try:
        return {"run": _run, "status": _status, "tables": _tables, "pack": _pack}[options.command](
            options
        )
    except (ValueError, FileNotFoundError) as e:
        print(f"capo_verl.experiments.study: {e}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from capo_verl.experiments.study.grid import load_study
    from capo_verl.experiments.study.pool import run_study

    # A shell starts background jobs with SIGINT ignored, and Python then leaves it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runs = [run for path in options.study for run in load_study(path).runs]
    if options.only:
        runs = [run for run in runs if run.method in options.only]
    outcome = run_study(
        runs[: options.limit],
        options.results,
        options.jobs,
        options.cache,
        retry_failed=not options.keep_failed,
    )
    print(
        f"{outcome.finished} finished, {outcome.failed} failed, {outcome.skipped} were there "
        "already"
    )
    if outcome.interrupted:
        print("interrupted; the same command goes on")
        return 130
    return 1 if outcome.failed else 0


def _status(options: argparse.Namespace) -> int:
    from rich.table import Table

    from capo_verl.experiments.study.grid import load_study
    from capo_verl.experiments.study.store import Store

    rows = Store(options.results).runs()
    status = {} if rows.empty else dict(zip(rows["run_id"], rows["status"], strict=True))
    seconds = {} if rows.empty else dict(zip(rows["run_id"], rows["wall_seconds"], strict=True))
    table = Table("study", "runs", "finished", "failed", "left", "core minutes so far")
    for path in options.study:
        study = load_study(path)
        ids = {run.run_id for run in study.runs}
        found = [status.get(i) for i in ids]
        spent = sum(float(seconds[i] or 0) for i in ids if i in seconds) / 60
        table.add_row(
            study.name, str(len(ids)), str(found.count("finished")), str(found.count("failed")),
            str(found.count(None)), f"{spent:.1f}",
        )  # fmt: skip
    Console().print(table)
    return 0


def _tables(options: argparse.Namespace) -> int:
    from capo_verl.experiments.study.grid import load_study
    from capo_verl.experiments.study.store import Store
    from capo_verl.experiments.study.tables import study_tables

    store = Store(options.results)
    for path in options.study:
        print(study_tables(load_study(path), store.runs(), store.curves()))
    return 0


def _pack(options: argparse.Namespace) -> int:
    from capo_verl.experiments.study.frame import pack
    from capo_verl.experiments.study.grid import load_study

    print(pack([load_study(path) for path in options.study], options.results, options.output))
    return 0
