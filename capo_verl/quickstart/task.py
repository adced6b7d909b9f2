# SPDX-License-Identifier: Apache-2.0
"""The task: reasoning-gym's ``spell_backward`` as verl parquet files, rewarded by reasoning-gym's own scorer.

:func:`distinct_splits`, :func:`cached_data` and :func:`compute_score` serve any of reasoning-gym's generators.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
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
TUPLE = "__tuple__"

Entry = Mapping[str, Any]
"""A problem of reasoning-gym: ``question``, ``answer``, ``metadata``."""
Messages = list[dict[str, str]]


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


def chat_prompt(entry: Entry) -> Messages:
    """Chat messages for one reasoning-gym entry.

    reasoning-gym's instruction ("Spell this word backward (example: sun -> nus): ...") is shortened, because every
    character is a token here; the problem itself and its scorer are untouched.
    """
    return [{"role": "user", "content": f"Backward: {entry['metadata']['word']}"}]


def distinct_splits(
    entries: Iterable[Entry], sizes: Mapping[str, int], problem: Callable[[Entry], str], widen: str
) -> dict[str, list[Entry]]:
    """Entries by split, which are filled one after the other and share no problem.

    Args:
        entries: as reasoning-gym generates them, with repetitions.
        sizes: of the splits. A split does not depend on the sizes of those behind it.
        problem: what makes two entries the same.
        widen: what to change if the entries are too few, for the error.

    Raises:
        ValueError: if there are fewer distinct entries than asked for.
    """
    pending = [split for split, size in sizes.items() for _ in range(size)]
    splits: dict[str, list[Entry]] = {split: [] for split in sizes}
    seen: set[str] = set()
    for entry in entries:
        if len(seen) == len(pending):
            break
        if problem(entry) not in seen:
            splits[pending[len(seen)]].append(entry)
            seen.add(problem(entry))
    if len(seen) < len(pending):
        raise ValueError(
            f"reasoning-gym has only {len(seen)} distinct problems for the {len(pending)} asked for: "
            f"lower the split sizes or widen {widen}"
        )
    return splits


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
        dataset, sizes, lambda entry: entry["metadata"]["word"].lower(), "min_word_len..max_word_len"
    )


def dump_entry(entry: Entry) -> str:
    """An entry as JSON. Tuples are marked: some scorers compare with them. Other objects become their text."""
    return json.dumps(_mark_tuples(entry), default=str)


def load_entry(text: str) -> dict[str, Any]:
    """What :func:`dump_entry` was given, but for objects that JSON does not have."""
    return json.loads(text, object_hook=lambda value: tuple(value[TUPLE]) if value.keys() == {TUPLE} else value)


def _mark_tuples(value: Any) -> Any:
    if isinstance(value, tuple):
        return {TUPLE: [_mark_tuples(v) for v in value]}
    if isinstance(value, list):
        return [_mark_tuples(v) for v in value]
    return {k: _mark_tuples(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def to_row(entry: Entry, index: int, split: str, prompt: Messages, ability: str) -> dict[str, Any]:
    """One row in verl's parquet schema. ``extra_info.entry`` is what the scorer needs, as JSON."""
    return {
        "data_source": SOURCE_PREFIX + entry["metadata"]["source_dataset"],
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": entry["answer"]},
        "extra_info": {"index": index, "split": split, "entry": dump_entry(entry)},
    }


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
        root: parent of the folder; :func:`capo_verl.quickstart.cache.cache_root` by default.
    """

    def build(folder: Path) -> None:
        import pandas as pd

        splits = problems()
        for split in ("train", "test"):
            rows = [to_row(entry, i, split, prompt, ability) for i, (entry, prompt) in enumerate(splits[split])]
            pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")

    return cached_folder("data", recipe, build, root)


def prepare_data(config: TaskConfig, root: Path | None = None) -> tuple[Path, bool]:
    """:func:`cached_data` of this task."""

    def problems() -> dict[str, list[tuple[Entry, Messages]]]:
        return {
            split: [(entry, chat_prompt(entry)) for entry in entries] for split, entries in generate(config).items()
        }

    return cached_data(config.recipe(), problems, root=root)


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
        raise ValueError("extra_info.entry is missing: write the data with capo_verl.quickstart.task.cached_data")
    score = float(scorer(data_source[len(SOURCE_PREFIX) :])(solution_str, load_entry(extra_info["entry"])))
    acc = float(score >= 1.0)
    return {"score": score if partial_credit else acc, "acc": acc}


@lru_cache(maxsize=8)
def scorer(generator: str) -> Any:
    """reasoning-gym's scorer: (answer, entry) to a number in [0, 1]."""
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(generator)
