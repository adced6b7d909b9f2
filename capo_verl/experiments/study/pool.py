# SPDX-License-Identifier: Apache-2.0
"""Runs a study in worker processes that stay alive, with a progress bar.

Ctrl-C loses only the runs in flight.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from capo_verl.experiments.study.grid import PlannedRun
from capo_verl.experiments.study.store import Store
from capo_verl.experiments.study.worker import describe, execute, prepare, start_worker

MERGE_SECONDS = 20.0


@dataclass
class Outcome:
    """Numbers of runs of a study by outcome."""

    finished: int = 0
    failed: int = 0
    skipped: int = 0
    interrupted: bool = False


def run_study(
    runs: Sequence[PlannedRun],
    results: Path,
    jobs: int = 1,
    cache: Path | None = None,
    console: Console | None = None,
    retry_failed: bool = True,
) -> Outcome:
    """Run what is not finished yet.

    Args:
        runs: those with an equal ``run_id`` are run once.
        results: see :class:`Store`.
        jobs: worker processes, each of one thread; 0: in this process, one run after the other.
        cache: folder of the warm starts.
        retry_failed: whether a run recorded as failed is tried again.

    Returns:
        The counts; failed runs are in the table, with their error.
    """
    store, console = Store(results), console or Console(stderr=True)
    done = store.finished() if retry_failed else set(store.runs().get("run_id", ()))
    unique = {run.run_id: run for run in runs}
    todo = [run for run in unique.values() if run.run_id not in done]
    outcome = Outcome(skipped=len(unique) - len(todo))
    if not todo:
        console.print(f"nothing to do: {outcome.skipped} runs are finished")
        return outcome
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=300) as progress:
        looped = [run for run in todo if run.tier != "verl"]
        bases = list({_base(run): run for run in looped}.values())
        # One task's bases share a model: all of those first, so that no worker waits for another's.
        noisy = [r for r in looped if r.tier == "tiny" and r.config.base_kind == "noisy"]
        keys = ("task", "task_knobs", "layers", "hidden")
        shared = list({_base(run, *keys): run for run in noisy}.values())
        try:
            if bases:
                bar = progress.add_task("warm starts", total=len(bases) + len(shared))
                for some, competent in ((shared, True), (bases, False)):
                    _Pool(jobs).map(
                        prepare,
                        [(b, cache, competent) for b in some],
                        lambda *_: progress.advance(bar),
                    )
            bar = progress.add_task("runs", total=len(todo))
            _run_all(todo, store, jobs, cache, progress, bar, outcome)
        except KeyboardInterrupt:
            outcome.interrupted = True
    store.merge()
    return outcome


def _base(run: PlannedRun, *keys: str) -> str:
    return repr([(k, v) for k, v in run.config.warm_start.items() if not keys or k in keys])


def _run_all(
    todo: Sequence[PlannedRun],
    store: Store,
    jobs: int,
    cache: Path | None,
    progress: Progress,
    bar: Any,
    outcome: Outcome,
) -> None:
    merged = time.monotonic()

    def ended(arguments: tuple[Any, ...], row: dict[str, Any] | None, error: str | None) -> None:
        nonlocal merged
        run: PlannedRun = arguments[0]
        if row is None:  # the process died: killed, out of memory
            row = {
                **describe(run),
                "status": "failed",
                "error": f"the worker process ended: {error}",
            }
            store.add(row, [])
        if row["status"] == "finished":
            outcome.finished += 1
        else:
            outcome.failed += 1
            progress.console.print(
                f"failed: {run.method} {run.run_id}: {row['error'].splitlines()[0]}", markup=False
            )
        progress.advance(bar)
        if time.monotonic() - merged > MERGE_SECONDS:
            store.merge()
            merged = time.monotonic()

    _Pool(jobs).map(
        execute, [(run, store.folder, cache) for run in todo if run.tier != "verl"], ended
    )
    for run in todo:
        if run.tier == "verl":
            # A Ray cluster of its own, one at a time, and in this process, so that Ctrl-C stops it
            # in good order.
            ended((run,), execute(run, store.folder, cache), None)


class _Pool:
    """A process pool that survives the death of a worker and ends at once on Ctrl-C."""

    def __init__(self, jobs: int):
        self.jobs = jobs

    def map(
        self,
        function: Callable[..., Any],
        calls: Sequence[tuple[Any, ...]],
        ended: Callable[[tuple[Any, ...], Any, str | None], None],
    ) -> None:
        """Call ``ended(arguments, result or None, error or None)`` for every call, as they end."""
        if self.jobs == 0:
            for arguments in calls:
                ended(arguments, function(*arguments), None)
            return
        waiting = list(calls)
        while waiting:
            waiting = self._until_broken(function, waiting, ended)

    def _until_broken(
        self,
        function: Callable[..., Any],
        calls: list[tuple[Any, ...]],
        ended: Callable[[tuple[Any, ...], Any, str | None], None],
    ) -> list[tuple[Any, ...]]:
        """Run calls until all have ended or a worker dies; returns those that are left.

        A call in flight with the worker counts as ended if it was alone.
        """
        queue = list(reversed(calls))
        executor = ProcessPoolExecutor(
            self.jobs, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
        )
        flying: dict[Future[Any], tuple[Any, ...]] = {}
        try:
            while queue or flying:
                while queue and len(flying) < self.jobs:
                    arguments = queue.pop()
                    flying[executor.submit(function, *arguments)] = arguments
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    arguments = flying.pop(future)
                    try:
                        result = future.result()
                    except BrokenProcessPool as e:
                        lost = [arguments, *flying.values()]
                        if len(lost) == 1:
                            ended(arguments, None, str(e))
                            return list(reversed(queue))
                        # Which of them it was is unknown: each again, alone.
                        _terminate(executor)
                        for alone in lost:
                            for _ in _Pool(1)._until_broken(function, [alone], ended):
                                pass
                        return list(reversed(queue))
                    ended(arguments, result, None)
        except BaseException:
            _terminate(executor)
            raise
        executor.shutdown()
        return []


def _terminate(executor: ProcessPoolExecutor) -> None:
    """Kill the workers: each writes its row in one step, so nothing half-written stays."""
    processes = list((executor._processes or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
