# SPDX-License-Identifier: Apache-2.0
"""Results: one file per finished run, written whole or not at all, merged into two parquet tables.

``parts/RUN_ID.json`` is what a run leaves; ``runs.parquet`` has one row per run, ``curves.parquet``
one per evaluation, ``steps.parquet`` one per optimizer step of the tiers that keep them. Merging
takes a lock, so several processes may share a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from capo_verl.utils import replace_text, replacing

RUNS, CURVES, STEPS = "runs.parquet", "curves.parquet", "steps.parquet"


class Store:
    """The results in one folder."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.parts = self.folder / "parts"
        self.parts.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        run: dict[str, Any],
        curve: list[dict[str, float]],
        steps: Sequence[dict[str, float]] = (),
    ) -> None:
        """Keep a run, its curve and its steps, in place of a run of the same id.

        The run is a row with ``run_id`` and ``status``.
        """
        found = {"run": run, "curve": curve, "steps": list(steps)}
        replace_text(self.parts / f"{run['run_id']}.json", json.dumps(found))

    def merge(self) -> None:
        """Move what :meth:`add` left into the tables."""
        with FileLock(self.folder / ".lock"):
            files = sorted(self.parts.glob("*.json"))
            if not files:
                return
            found = [json.loads(f.read_text()) for f in files]
            ids = {x["run"]["run_id"] for x in found}
            tables = {CURVES: _rows(found, "curve"), STEPS: _rows(found, "steps")}
            for name, rows in (*tables.items(), (RUNS, [x["run"] for x in found])):
                _append(self.folder / name, rows, ids)
            for f in files:
                f.unlink()

    def runs(self) -> pd.DataFrame:
        """One row per run, failed ones included."""
        self.merge()
        return read(self.folder / RUNS)

    def curves(self) -> pd.DataFrame:
        """One row per evaluation: ``run_id`` and the columns of a run's curve."""
        self.merge()
        return read(self.folder / CURVES)

    def steps(self) -> pd.DataFrame:
        """One row per optimizer step: ``run_id`` and its measurements."""
        self.merge()
        return read(self.folder / STEPS)

    def finished(self) -> set[str]:
        """Ids of the runs that need not be run again."""
        runs = self.runs()
        return set() if runs.empty else set(runs.loc[runs["status"] == "finished", "run_id"])


def read(path: Path) -> pd.DataFrame:
    """A parquet table; empty if there is none."""
    return pd.read_parquet(path) if path.exists() else pd.DataFrame()


def write(path: Path, table: pd.DataFrame) -> None:
    """Replace a parquet table in one step."""
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def _rows(parts: Iterable[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [{"run_id": x["run"]["run_id"], **row} for x in parts for row in x.get(key, ())]


def _append(path: Path, rows: Iterable[dict[str, Any]], replaced: set[str]) -> None:
    old, new = read(path), pd.DataFrame(list(rows))
    if not old.empty:
        old = old[~old["run_id"].isin(replaced)]
    tables = [t for t in (old, new) if not t.empty]
    if tables:
        write(path, pd.concat(tables, ignore_index=True))
