# SPDX-License-Identifier: Apache-2.0
"""Problems to be answered: rows of verl's schema, each known by the hash of its contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capo_verl.data.schema import prompt_problems
from capo_verl.data.sources import read_file
from capo_verl.data.values import text_of


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
            place = f"--data {file}, row {number}"
            try:
                asked, source, truth = (
                    row["prompt"], row["data_source"], row["reward_model"]["ground_truth"],
                )  # fmt: skip
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{place}: not a row of verl's schema ({type(error).__name__}: {error}); write "
                    "the file with `capo-verl data`"
                ) from error
            for field, problem in prompt_problems(asked, roles=None):
                raise ValueError(f"{place}, prompt{field}: {problem}")
            prompt = [{"role": m["role"], "content": m["content"]} for m in asked]
            source = text_of(source, f"{place}, data_source")
            if not isinstance(truth, str):
                truth = text_of(truth, f"{place}, reward_model.ground_truth")
            text = json.dumps([source, prompt, truth], ensure_ascii=True)
            key = hashlib.sha256(text.encode()).hexdigest()[:16]
            problems.setdefault(
                key, Problem(key, source, prompt, truth, dict(row.get("extra_info") or {}))
            )
    return list(problems.values())
