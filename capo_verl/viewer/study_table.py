# SPDX-License-Identifier: Apache-2.0
"""Tables of runs which ``scripts/study.py`` writes."""

from __future__ import annotations

from pathlib import Path

from capo_verl.viewer.run import Run


def is_study_table(path: Path) -> bool:
    return path.suffix == ".parquet"


def read_study_table(path: Path) -> list[Run]:
    raise ValueError(f"{path}: not yet")
