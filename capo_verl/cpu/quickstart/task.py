# SPDX-License-Identifier: Apache-2.0
"""The task: reasoning-gym's ``spell_backward`` as verl parquet files, with its own scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from capo_verl.data.cache import cached_folder
from capo_verl.data.gym import SOURCE_PREFIX, Entry, Messages, distinct_splits, to_row

GENERATOR = "spell_backward"
DATA_SOURCE = SOURCE_PREFIX + GENERATOR
SPLITS = ("test", "train", "sft")


@dataclass(frozen=True)
class TaskConfig:
    """Generator of the problems, and sizes of the splits, which share no word."""

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
        return {
            "generator": GENERATOR,
            "reasoning_gym": version("reasoning-gym"),
            "format": 1,
            **asdict(self),
        }


def chat_prompt(entry: Entry) -> Messages:
    """Chat messages for one reasoning-gym entry.

    reasoning-gym's instruction ("Spell this word backward (example: sun -> nus): ...") is
    shortened, because every character is a token here; the problem itself and its scorer are
    untouched.
    """
    return [{"role": "user", "content": f"Backward: {entry['metadata']['word']}"}]


def generate(config: TaskConfig) -> dict[str, list[Entry]]:
    """reasoning-gym entries by split: ``{"test": [...], "train": [...], "sft": [...]}``.

    Raises:
        ValueError: if the word list has too few distinct words of the requested lengths.
    """
    import reasoning_gym

    sizes = {split: getattr(config, f"{split}_size") for split in SPLITS}
    dataset = reasoning_gym.create_dataset(
        GENERATOR,
        seed=config.seed,
        size=4 * sum(sizes.values()),
        min_word_len=config.min_word_len,
        max_word_len=config.max_word_len,
    )
    # The scorer ignores case, so must the split.
    return distinct_splits(
        dataset,
        sizes,
        lambda entry: entry["metadata"]["word"].lower(),
        "min_word_len..max_word_len",
    )


def cached_data(
    recipe: Mapping[str, Any],
    problems: Callable[[], Mapping[str, list[tuple[Entry, Messages]]]],
    ability: str = "algorithmic",
    root: Path | None = None,
) -> tuple[Path, bool]:
    """Folder with ``train.parquet`` and ``test.parquet``, and whether it was cached.

    Args:
        recipe: everything the data depend on.
        problems: makes the entries and their prompts, for the splits "train" and "test".
        ability: for verl's column of that name.
        root: parent of the folder; :func:`capo_verl.data.cache.cache_root` by default.
    """

    def build(folder: Path) -> None:
        import pandas as pd

        splits = problems()
        for split in ("train", "test"):
            rows = [
                to_row(entry, i, split, prompt, ability)
                for i, (entry, prompt) in enumerate(splits[split])
            ]
            pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")

    return cached_folder("data", recipe, build, root)


def prepare_data(config: TaskConfig, root: Path | None = None) -> tuple[Path, bool]:
    """Files of this task, by :func:`cached_data`."""

    def problems() -> dict[str, list[tuple[Entry, Messages]]]:
        return {
            split: [(entry, chat_prompt(entry)) for entry in entries]
            for split, entries in generate(config).items()
        }

    return cached_data(config.recipe(), problems, root=root)
