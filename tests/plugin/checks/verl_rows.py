# SPDX-License-Identifier: Apache-2.0
"""Rows in verl's schema that every reward of this package takes, and files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]


def verl_row(**changes: Any) -> Row:
    """A row; ``changes`` replace columns."""
    row = {
        "data_source": "reasoning_gym/chain_sum",
        "prompt": [{"role": "user", "content": "1 + 1 ="}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"index": 0, "entry": json.dumps({"answer": "2"})},
    }
    return {**row, **changes}


def write(rows: Sequence[Row], path: Path) -> Path:
    """Write rows as parquet, JSON lines, or a JSON list, by the path's ending."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_splits(folder: Path, count: int = 8) -> Path:
    """Write ``train.parquet`` and ``test.parquet``, and return their folder."""
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        write([verl_row()] * count, folder / f"{split}.parquet")
    return folder
