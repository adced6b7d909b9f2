# SPDX-License-Identifier: Apache-2.0
"""Work of a worker process: one run, from its plan to a row of the table.

It lives for many runs.
"""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

from capo_verl.experiments.provenance import commit, processor
from capo_verl.experiments.study.grid import PlannedRun
from capo_verl.experiments.study.measures import of_steps, summarise
from capo_verl.experiments.study.store import Store


def start_worker() -> None:
    """One thread; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)


def prepare(run: PlannedRun, cache: Path | None, competent: bool = False) -> str | None:
    """Build the base policy of a run, or only the competent one below it; returns the error."""
    from capo_verl.experiments.study.loop import load_policy
    from capo_verl.experiments.study.warm_start import competent_policy

    try:
        (competent_policy if competent else load_policy)(run.config, cache)
    except Exception as e:  # noqa: BLE001 - the runs that need it report it again, each in its own row
        return f"{type(e).__name__}: {e}"
    return None


def execute(run: PlannedRun, results: Path, cache: Path | None = None) -> dict[str, Any]:
    """Run it and keep its row, whatever happens.

    Returns:
        The row: what was planned, ``status`` (``finished`` or ``failed``), ``error``, where and
        when, and the measures.
    """
    row = describe(run)
    curve: list[dict[str, float]] = []
    steps: list[dict[str, float]] = []
    start = time.perf_counter()
    try:
        if run.tier == "verl":
            from capo_verl.experiments.study.verl_tier import train_verl

            curve = train_verl(run, results)
        else:
            from capo_verl.experiments.study.loop import train

            trained = train(run.config, cache)
            curve, steps = trained.curve, trained.steps
        row.update(status="finished", error="", **summarise(curve), **of_steps(steps))
    except Exception as e:  # noqa: BLE001 - a failure is a result
        row.update(
            status="failed", error=f"{type(e).__name__}: {e}\n{traceback.format_exc(limit=-4)}"
        )
    row["wall_seconds"] = time.perf_counter() - start
    Store(results).add(row, curve, steps)
    return row


def describe(run: PlannedRun) -> dict[str, Any]:
    """Columns of a run that are known before it starts."""
    config = run.config.to_dict()
    task = getattr(run.config, "task", getattr(run.config, "launcher", ""))
    row: dict[str, Any] = {
        "run_id": run.run_id, "tier": run.tier, "method": run.method, "task": task,
        "lr": run.config.lr, "seed": run.config.seed, "steps": run.config.steps,
        "config": json.dumps(config, sort_keys=True), "commit": commit(), "machine": machine(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    if run.tier != "verl":
        row["batch"] = run.config.prompts * run.config.group
    return row


@lru_cache(maxsize=1)
def machine() -> str:
    """Processor, cores and library version; no names of machines."""
    import torch

    return f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}"
