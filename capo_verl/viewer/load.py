# SPDX-License-Identifier: Apache-2.0
"""Runs from a file or a folder that a user points at."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from capo_verl.viewer.config import find_config
from capo_verl.viewer.derived import add_derived
from capo_verl.viewer.file_log import is_file_log, read_file_logs
from capo_verl.viewer.notes import DamagedLines, reason, visible
from capo_verl.viewer.panels import gap_notes
from capo_verl.viewer.samples import find_samples, is_samples_file, read_samples
from capo_verl.viewer.series import Run, Series
from capo_verl.viewer.study_table import is_study_table, read_study_table
from capo_verl.viewer.tensorboard_log import is_event_file, read_event_files
from capo_verl.viewer.wandb_log import SUFFIX, read_wandb

logger = logging.getLogger(__name__)

KINDS = (
    "verl's file logger (.jsonl), TensorBoard event files, a wandb offline run (.wandb), a table "
    "of capo_verl.experiments.study (runs.parquet), or a folder that holds one of them"
)
ATTEMPT = re.compile(r"(metrics)(\.\d+)?\.jsonl")
"""The launchers number the logs of a run's further starts."""
MOST_PROBLEMS = 5


def load_runs(paths: Sequence[Path], lost: Callable[[str], None] = logger.warning) -> list[Run]:
    """All runs found at the paths, with names of their own.

    What is damaged in a run's files is left out; the run's notes say so.

    Args:
        lost: called with a sentence for each log of which nothing can be read.

    Raises:
        ValueError: for a path that does not exist, or if nothing can be read at all.
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder; give {KINDS}")
    problems: list[str] = []
    runs = [run for path in paths for run in _load(path, problems)]
    if not runs:
        more = len(problems) - MOST_PROBLEMS
        shown = [*problems[:MOST_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        raise ValueError("; ".join(shown))
    for problem in problems:
        lost(problem)
    for run in runs:
        run.name = visible(run.name)
        run.notes += gap_notes(run)
        add_derived(run)
    _tell_apart(runs)
    return runs


def _load(path: Path, problems: list[str]) -> list[Run]:
    """Runs at a path; where there is none, ``problems`` says why."""
    before, folder = len(problems), path.is_dir()
    runs = _load_folder(path, problems) if folder else _load_files([path], problems)
    if not runs and len(problems) == before:
        problems.append(
            f"{path}: no log of a run in this folder; give {KINDS}"
            if folder
            else f"{path}: not a log of a run; give {KINDS}"
        )
    return runs


def _load_folder(folder: Path, problems: list[str]) -> list[Run]:
    """The logs in the folder; if there are none, those of each folder below."""
    found: list[Run] = []
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            inside = sorted(here.iterdir())
            runs = _load_files([path for path in inside if path.is_file()], problems)
            if not runs:
                waiting += [path for path in reversed(inside) if _is_folder(path)]
        except OSError as e:
            problems.append(f"{here}: cannot be read ({reason(e)})")
            continue
        found += runs
    return found


def _is_folder(path: Path) -> bool:
    # wandb links to its latest run.
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")


def _load_files(files: list[Path], problems: list[str]) -> list[Run]:
    """Runs of files in one folder.

    Of several kinds of log of one run the first that can be read counts.
    """
    logs = _file_logs(files, problems)
    files = [path for path in files if path.stat().st_size]
    events = [path for path in files if is_event_file(path)]
    starts = sorted(
        (path for path in logs if ATTEMPT.fullmatch(path.name)),
        key=lambda path: (len(path.name), path.name),
    )
    kinds: list[list[Callable[[], list[Run]]]] = [
        [partial(read_study_table, path) for path in files if is_study_table(path)],
        [partial(_of_file_logs, starts[0].resolve().parent.name, starts)] if starts else [],
        [partial(_of_event_files, events)] if events else [],
        [partial(_of_wandb, path) for path in files if path.suffix == SUFFIX],
        [partial(_of_samples, path) for path in files if is_samples_file(path)],
    ]
    kinds[1] += [partial(_of_file_logs, path.stem, [path]) for path in logs if path not in starts]
    for readers in kinds:
        runs: list[Run] = []
        for read in readers:
            try:
                runs += read()
            except (ValueError, OSError) as e:
                problems.append(str(e))
        if runs:
            return runs
    return []


def _file_logs(files: list[Path], problems: list[str]) -> list[Path]:
    """verl's file logs; a file that is named as a log and is empty, or none, is a problem."""
    found = []
    for path in files:
        start = ATTEMPT.fullmatch(path.name) is not None
        named = start or is_event_file(path) or path.suffix == SUFFIX or len(files) == 1
        try:
            if is_file_log(path):
                found.append(path)
            elif named and not path.stat().st_size:
                problems.append(f"{path}: the file is empty; nothing has been logged yet")
            elif start:
                problems.append(f"{path}: not a log of a run; give {KINDS}")
        except OSError as e:
            problems.append(f"{path}: cannot be read ({reason(e)})")
    return found


def _of_file_logs(name: str, starts: list[Path]) -> list[Run]:
    notes: list[str] = []
    return [_run(name, starts[0], read_file_logs(starts, notes), notes)]


def _of_event_files(events: list[Path]) -> list[Run]:
    notes: list[str] = []
    return [_run(events[0].parent.name, events[0], read_event_files(events, notes), notes)]


def _of_wandb(path: Path) -> list[Run]:
    notes: list[str] = []
    found = read_wandb(path, notes)
    run = _run(found.name or path.stem, path, found.series, notes)
    run.config = found.config or run.config
    return [run]


def _of_samples(path: Path) -> list[Run]:
    damaged = DamagedLines(path)
    samples = read_samples(path, damaged)
    if not samples:
        raise ValueError("; ".join([f"{path}: no token sample in this file", *damaged.notes()]))
    return [Run(path.resolve().parent.name, path, {}, samples=samples, notes=damaged.notes())]


def _run(name: str, source: Path, series: dict[str, Series], notes: list[str]) -> Run:
    if not series:
        raise ValueError(
            "; ".join(
                [f"{source}: no metrics in this log; the run has not finished a step yet", *notes]
            )
        )
    folder = source.resolve().parent
    try:
        config = find_config(folder)
    except (ValueError, OSError) as e:
        notes.append(f"{e}; the run is shown without it")
        config = None
    samples = find_samples(folder, config, notes)
    return Run(name, source, series, config, samples, notes=notes)


def _tell_apart(runs: list[Run]) -> None:
    """Give runs names of their own.

    A name that repeats gets the folder in front, and a number if that repeats as well.
    """
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{visible(run.source.resolve().parent.parent.name)}/{run.name}"
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
