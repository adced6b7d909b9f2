# SPDX-License-Identifier: Apache-2.0
"""The task: reasoning-gym's ``spell_backward`` as verl parquet files, rewarded by reasoning-gym's own scorer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from capo_verl.quickstart.cache import cached_folder

SOURCE_PREFIX = "reasoning_gym/"
GENERATOR = "spell_backward"
DATA_SOURCE = SOURCE_PREFIX + GENERATOR
SPLITS = ("test", "train", "sft")


@dataclass(frozen=True)
class TaskConfig:
    """Which problems are generated, and how many fall into each split. The splits share no word."""

    min_word_len: int = 5
    max_word_len: int = 8
    test_size: int = 256
    """Held-out problems, never trained on."""
    train_size: int = 4096
    """Problems of the RL run."""
    sft_size: int = 20000
    """Problems whose answers the warm start imitates."""
    seed: int = 2025

    def recipe(self) -> dict[str, Any]:
        """Everything the data depend on."""
        return {"generator": GENERATOR, "reasoning_gym": version("reasoning-gym"), "format": 1, **asdict(self)}


def chat_prompt(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """Chat messages for one reasoning-gym entry.

    reasoning-gym's instruction ("Spell this word backward (example: sun -> nus): ...") is shortened, because every
    character is a token here; the problem itself and its scorer are untouched.
    """
    return [{"role": "user", "content": f"Backward: {entry['metadata']['word']}"}]


def generate(config: TaskConfig) -> dict[str, list[dict[str, Any]]]:
    """reasoning-gym entries by split: ``{"test": [...], "train": [...], "sft": [...]}``.

    Raises:
        ValueError: if the word list has too few distinct words of the requested lengths.
    """
    import reasoning_gym

    sizes = {split: getattr(config, f"{split}_size") for split in SPLITS}
    draws = 4 * sum(sizes.values())
    dataset = reasoning_gym.create_dataset(
        GENERATOR, seed=config.seed, size=draws, min_word_len=config.min_word_len, max_word_len=config.max_word_len
    )
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    pending = [split for split in SPLITS for _ in range(sizes[split])]
    seen: set[str] = set()
    for entry in dataset:
        if len(seen) == len(pending):
            break
        word = entry["metadata"]["word"].lower()  # the scorer ignores case, so must the split
        if word not in seen:
            splits[pending[len(seen)]].append(entry)
            seen.add(word)
    if len(seen) < len(pending):
        raise ValueError(
            f"reasoning-gym has only {len(seen)} distinct words for {len(pending)} problems: "
            "lower the split sizes or widen min_word_len..max_word_len"
        )
    return splits


def to_row(entry: Mapping[str, Any], index: int, split: str) -> dict[str, Any]:
    """One row in verl's parquet schema. ``extra_info.entry`` is what the scorer needs, as JSON."""
    return {
        "data_source": DATA_SOURCE,
        "prompt": chat_prompt(entry),
        "ability": "algorithmic",
        "reward_model": {"style": "rule", "ground_truth": entry["answer"]},
        "extra_info": {"index": index, "split": split, "entry": json.dumps(entry)},
    }


def write_parquet(entries: list[dict[str, Any]], split: str, path: Path) -> None:
    """Write the entries of one split to ``path``."""
    import pandas as pd

    pd.DataFrame([to_row(entry, index, split) for index, entry in enumerate(entries)]).to_parquet(path)


def prepare_data(config: TaskConfig, root: Path | None = None) -> tuple[Path, bool]:
    """Folder with ``train.parquet`` and ``test.parquet``, and whether it was cached."""

    def build(folder: Path) -> None:
        splits = generate(config)
        for split in ("train", "test"):
            write_parquet(splits[split], split, folder / f"{split}.parquet")

    return cached_folder("data", config.recipe(), build, root)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    partial_credit: bool = True,
    **_: Any,
) -> dict[str, float]:
    """Reward of one response, by reasoning-gym's scorer. verl calls it through ``reward.custom_reward_function``.

    Args:
        data_source: ``reasoning_gym/<generator>``.
        solution_str: the decoded response.
        ground_truth: reasoning-gym's reference answer; the scorer reads it from the entry, which carries more.
        extra_info: the row's ``extra_info``; ``entry`` is the reasoning-gym entry as JSON.
        partial_credit: False gives 0 to everything that has not the scorer's full mark.

    Returns:
        ``score``: the scorer's value in [0, 1]; ``acc``: 1.0 for the full mark, else 0.0.

    Raises:
        ValueError: if the row is not one of this task's.
    """
    if not data_source.startswith(SOURCE_PREFIX):
        raise ValueError(f"data_source={data_source!r}: expected {SOURCE_PREFIX}<generator>")
    if not extra_info or "entry" not in extra_info:
        raise ValueError("extra_info.entry is missing: write the data with capo_verl.quickstart.task.prepare_data")
    score = float(_scorer(data_source[len(SOURCE_PREFIX) :])(solution_str, json.loads(extra_info["entry"])))
    acc = float(score >= 1.0)
    return {"score": score if partial_credit else acc, "acc": acc}


@lru_cache(maxsize=8)
def _scorer(generator: str) -> Any:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(generator)
