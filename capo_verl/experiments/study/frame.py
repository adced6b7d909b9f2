# SPDX-License-Identifier: Apache-2.0
"""Results of a study as one table: a row per method, cell and seed.

Its files are packed for the repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from capo_verl.experiments.study.grid import Study
from capo_verl.experiments.study.store import CURVES, RUNS, STEPS, Store, read, write

PACKED_CURVE = (
    "step",
    "completions",
    "accepted_tokens",
    "accuracy",
    "reward",
    "entropy",
    "kl",
    "rejection",
    "scale",
)
PACKED_LIMIT = 3_000_000
"""Bytes a repository should have to carry, all tables together."""
DROPPED = ("started", "wall_seconds")


def study_frame(study: Study, runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of a study that were tried.

    Args:
        runs: :meth:`Store.runs`.

    Returns:
        Its rows with ``study``, ``control``, ``method`` (as the study calls it) and ``cell`` (JSON,
        axis to value without seed).
    """
    planned = pd.DataFrame(
        [
            {
                "study": study.name, "control": study.control, "method": run.method,
                "run_id": run.run_id, "cell": json.dumps(dict(run.cell)),
            }
            for run in study.runs
        ]
    )  # fmt: skip
    if runs.empty:
        return planned.iloc[:0]
    return planned.merge(runs.drop(columns="method"), on="run_id", how="inner")


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows sorted: the control first, then by method and cell.

    Cells are sorted by the numbers that they begin with, the smallest first.
    """
    methods = [frame["control"].iloc[0], *frame["method"].unique()]
    cells = [[_sortable(value) for value in json.loads(cell).values()] for cell in frame["cell"]]
    keys = [(methods.index(m), len(c), c) for m, c in zip(frame["method"], cells, strict=True)]
    return frame.iloc[sorted(range(len(frame)), key=keys.__getitem__)]


def _sortable(value: str) -> tuple[float, str]:
    number = re.match(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", value)
    return (float(number[0]), value) if number else (0.0, value)


def pack(studies: Sequence[Study], results: Path, output: Path) -> str:
    """Write ``runs.parquet``, ``curves.parquet`` and, where a tier keeps them, ``steps.parquet`` of
    some studies into ``output``.

    Studies that are packed there already, and are not among these, stay.

    Returns:
        One sentence about what was written.

    Raises:
        ValueError: if a study has no results, or the files would be too large.
    """
    store = Store(results)
    runs, curves = store.runs(), store.curves()
    frames = [study_frame(study, runs) for study in studies]
    for study, frame in zip(studies, frames, strict=True):
        if frame.empty:
            raise ValueError(f"{results} has no run of the study {study.name}; run it first")
    output.mkdir(parents=True, exist_ok=True)
    old_runs, old_curves = read(output / RUNS), read(output / CURVES)
    if not old_runs.empty:
        old_runs = old_runs[~old_runs["study"].isin([s.name for s in studies])]
    packed = pd.concat([t for t in (old_runs, *frames) if not t.empty], ignore_index=True)
    packed = packed.drop(columns=[c for c in DROPPED if c in packed])
    curves = pd.concat([t for t in (old_curves, curves) if not t.empty], ignore_index=True)
    curves = curves.drop_duplicates(["run_id", "step"], keep="last")
    curves = curves.loc[
        curves["run_id"].isin(packed["run_id"]),
        ["run_id", *(c for c in PACKED_CURVE if c in curves)],
    ]
    floats = [c for c in curves if c not in ("run_id",)]
    curves[floats] = curves[floats].astype("float32")
    steps = pd.concat([read(output / STEPS), store.steps()], ignore_index=True)
    if not steps.empty:
        steps = steps[steps["run_id"].isin(packed["run_id"])]
        steps = steps.drop_duplicates(["run_id", "step"], keep="last")
        numbers = [c for c in steps if c != "run_id"]
        steps[numbers] = steps[numbers].astype("float32")
        write(output / STEPS, steps.sort_values(["run_id", "step"], ignore_index=True))
    write(output / RUNS, packed.sort_values(["study", "method", "cell", "seed"], ignore_index=True))
    write(output / CURVES, curves.sort_values(["run_id", "step"], ignore_index=True))
    names = (RUNS, CURVES, STEPS)
    size = sum((output / n).stat().st_size for n in names if (output / n).exists())
    if size > PACKED_LIMIT:
        raise ValueError(
            f"{output}: {size} bytes are too many for a repository (limit {PACKED_LIMIT}); pack "
            "fewer studies"
        )
    return (
        f"{len(packed)} runs of {packed['study'].nunique()} studies, {size / 1e6:.2f} MB in "
        f"{output}"
    )
