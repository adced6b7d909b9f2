# SPDX-License-Identifier: Apache-2.0
"""The task: reasoning-gym's ``letter_counting``.

Two solved problems before each show the form of an answer.

What a model of this size gets right at temperature 1, by reasoning-gym's scorer, decided it (8
answers to each of 16 problems, share right): letter_counting 0.41, products of digits 0.13, sums of
digits 0.04; without solved problems the answers are sentences and all are wrong.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from capo_verl.cpu.quickstart.task import cached_data
from capo_verl.data.gym import Entry, Messages, distinct_splits

GENERATOR = "letter_counting"


@dataclass(frozen=True)
class TaskConfig:
    """Generator of the problems, and sizes of the splits.

    The splits share no problem.
    """

    min_words: int = 2
    max_words: int = 4
    examples_size: int = 2
    """Solved problems before each prompt."""
    test_size: int = 64
    train_size: int = 1024
    seed: int = 2025

    def recipe(self) -> dict[str, Any]:
        """Everything the data depend on."""
        return {
            "generator": GENERATOR,
            "reasoning_gym": version("reasoning-gym"),
            "format": 1,
            **asdict(self),
        }


def generate(config: TaskConfig) -> dict[str, list[Entry]]:
    """reasoning-gym entries by split: ``{"examples": [...], "test": [...], "train": [...]}``."""
    import reasoning_gym

    sizes = {split: getattr(config, f"{split}_size") for split in ("examples", "test", "train")}
    dataset = reasoning_gym.create_dataset(
        GENERATOR,
        seed=config.seed,
        size=4 * sum(sizes.values()),
        min_words=config.min_words,
        max_words=config.max_words,
    )
    return distinct_splits(dataset, sizes, lambda entry: entry["question"], "min_words..max_words")


def chat_prompt(entry: Entry, examples: list[Entry]) -> Messages:
    """The examples as turns of a conversation, then the entry's question."""
    solved = (
        {"role": role, "content": example[key]}
        for example in examples
        for role, key in (("user", "question"), ("assistant", "answer"))
    )
    return [*solved, {"role": "user", "content": entry["question"]}]


def prepare_data(config: TaskConfig, root: Path | None = None) -> tuple[Path, bool]:
    """Folder with ``train.parquet`` and ``test.parquet``, and whether it was cached."""

    def problems() -> dict[str, list[tuple[Entry, Messages]]]:
        splits = generate(config)
        examples = splits.pop("examples")
        return {
            split: [(entry, chat_prompt(entry, examples)) for entry in entries]
            for split, entries in splits.items()
        }

    return cached_data(config.recipe(), problems, root=root)
