# SPDX-License-Identifier: Apache-2.0
"""Problems to be answered: rows of verl's schema, each known by the hash of its contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capo_verl.data.sources import read_file


@dataclass(frozen=True)
class Problem:
    """One row."""

    key: str
    data_source: str
    prompt: list[dict[str, str]]
    ground_truth: str
    extra_info: dict[str, Any]


def read_problems(files: Sequence[str], limit: int | None = None) -> list[Problem]:
    """Problems of all files, at most ``limit`` of each, without repetitions.

    Raises:
        ValueError: naming the file, and the row that lacks something.
    """
    problems: dict[str, Problem] = {}
    for file in files:
        if not Path(file).exists():
            raise ValueError(f"--data {file}: no such file")
        rows = list(read_file(Path(file)))
        if not rows:
            raise ValueError(f"--data {file}: no rows")
        for number, row in enumerate(rows[:limit]):
            try:
                prompt = [
                    {"role": str(m["role"]), "content": str(m["content"])} for m in row["prompt"]
                ]
                source, truth = str(row["data_source"]), str(row["reward_model"]["ground_truth"])
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"--data {file}, row {number}: not a row of verl's schema "
                    f"({type(error).__name__}: {error}); write the file with `capo-verl data`"
                ) from error
            text = json.dumps([source, prompt, truth], ensure_ascii=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            problems.setdefault(
                key, Problem(key, source, prompt, truth, dict(row.get("extra_info") or {}))
            )
    return list(problems.values())
