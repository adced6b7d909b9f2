# SPDX-License-Identifier: Apache-2.0
"""Runs from a file or a folder that a user points at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from capo_verl.viewer.config import find_config
from capo_verl.viewer.derived import add_derived
from capo_verl.viewer.file_log import is_file_log, read_file_log
from capo_verl.viewer.samples import find_samples, is_samples_file, read_samples
from capo_verl.viewer.series import Run, Series
from capo_verl.viewer.study_table import is_study_table, read_study_table
from capo_verl.viewer.tensorboard_log import is_event_file, read_event_files
from capo_verl.viewer.wandb_log import SUFFIX, read_wandb

KINDS = (
    "verl's file logger (.jsonl), TensorBoard event files, a wandb offline run (.wandb), a table "
    "of capo_verl.experiments.study (runs.parquet), or a folder that holds one of them"
)
ATTEMPT = re.compile(r"(metrics)(\.\d+)?\.jsonl")
"""The launchers number the logs of a run's further starts."""


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs found at the paths, with names of their own.

    Raises:
        ValueError: for a path that does not exist, cannot be read, or holds no run.
    """
    runs = [run for path in paths for run in _load(path)]
    for run in runs:
        add_derived(run)
    _tell_apart(runs)
    return runs


def _load(path: Path) -> list[Run]:
    if path.is_dir():
        runs = _load_folder(path)
        if not runs:
            raise ValueError(f"{path}: no log of a run in this folder; give {KINDS}")
        return runs
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder; give {KINDS}")
    if not path.stat().st_size:
        raise ValueError(f"{path}: the file is empty; nothing has been logged yet")
    runs = _load_files([path])
    if not runs:
        raise ValueError(f"{path}: not a log of a run; give {KINDS}")
    return runs


def _load_folder(folder: Path) -> list[Run]:
    """The logs in the folder; if there are none, those of each folder below."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size)
    runs = _load_files(files)
    if runs:
        return runs
    return [
        run
        for below in sorted(path for path in folder.iterdir() if _is_folder(path))
        for run in _load_folder(below)
    ]


def _is_folder(path: Path) -> bool:
    # wandb links to its latest run.
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")


def _load_files(files: list[Path]) -> list[Run]:
    """Runs of files in one folder.

    Of several kinds of log of one run the first that is found counts.
    """
    tables = [path for path in files if is_study_table(path)]
    if tables:
        return [run for path in tables for run in read_study_table(path)]
    logs = [path for path in files if is_file_log(path)]
    if logs:
        return _of_file_logs(logs)
    events = [path for path in files if is_event_file(path)]
    if events:
        return [_run(events[0].parent.name, events[0], read_event_files(events))]
    offline = [path for path in files if path.suffix == SUFFIX]
    if offline:
        return [_of_wandb(path) for path in offline]
    return [
        Run(path.parent.name, path, {}, samples=read_samples(path))
        for path in files
        if is_samples_file(path)
    ]


def _of_file_logs(logs: list[Path]) -> list[Run]:
    starts = sorted(
        (path for path in logs if ATTEMPT.fullmatch(path.name)),
        key=lambda path: (len(path.name), path.name),
    )
    runs = [_run(path.stem, path, read_file_log(path)) for path in logs if path not in starts]
    if starts:
        merged: dict[str, Series] = {}
        for path in starts:  # where steps repeat the later start wins
            for key, series in read_file_log(path).items():
                at = (merged[key].at() if key in merged else {}) | series.at()
                merged[key] = Series(sorted(at), [at[step] for step in sorted(at)])
        runs.insert(0, _run(starts[0].resolve().parent.name, starts[0], merged))
    return runs


def _of_wandb(path: Path) -> Run:
    found = read_wandb(path)
    run = _run(found.name or path.stem, path, found.series)
    run.config = found.config or run.config
    return run


def _run(name: str, source: Path, series: dict[str, Series]) -> Run:
    if not series:
        raise ValueError(f"{source}: no metrics in this log; the run has not finished a step yet")
    config = find_config(source.resolve().parent)
    return Run(name, source, series, config, find_samples(source.resolve().parent, config))


def _tell_apart(runs: list[Run]) -> None:
    """Give runs names of their own.

    A name that repeats gets the folder in front, and a number if that repeats as well.
    """
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.source.resolve().parent.parent.name}/{run.name}"
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
