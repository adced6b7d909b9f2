# SPDX-License-Identifier: Apache-2.0
"""Problems of reasoning-gym's generators as rows of verl's schema, with their own scorers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from capo_verl.data.rows import Row, make_row
from capo_verl.data.schema import SOURCE_PREFIX as SOURCE_PREFIX
from capo_verl.data.templates import Template

TUPLE = "__tuple__"

Entry = Mapping[str, Any]
"""A problem of reasoning-gym: ``question``, ``answer``, ``metadata``."""
Messages = list[dict[str, str]]

OVERSAMPLING = 4
"""Problems generated per problem asked for: generators repeat themselves."""


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
            f"reasoning-gym has only {len(seen)} distinct problems for the {len(pending)} asked "
            f"for: lower the split sizes or widen {widen}"
        )
    return splits


def dump_entry(entry: Entry) -> str:
    """An entry as JSON.

    Tuples are marked: some scorers compare with them. Other objects become their text.
    """
    return json.dumps(_mark_tuples(entry), default=str)


def load_entry(text: str) -> dict[str, Any]:
    """The entry that :func:`dump_entry` was given, but for objects that JSON does not have."""
    return json.loads(
        text, object_hook=lambda value: tuple(value[TUPLE]) if value.keys() == {TUPLE} else value
    )


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


def gym_rows(
    name: str, sizes: Mapping[str, int], seed: int, settings: Mapping[str, Any], template: Template
) -> dict[str, list[Row]]:
    """Rows by split, no question twice.

    Args:
        name: ``reasoning_gym/GENERATOR``.
        sizes: problems per split; a split does not depend on those behind it.
        settings: of the generator.

    Raises:
        ValueError: for a generator or a setting that does not exist, and if it has fewer distinct
            problems.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'capo-verl[data]'") from error
    generator = name.removeprefix(SOURCE_PREFIX)
    if generator not in DATASETS or generator == "composite":
        close = get_close_matches(generator, DATASETS, n=3)
        raise ValueError(
            f"reasoning-gym has no generator {generator!r}: "
            f"{'close: ' + ', '.join(close) if close else ''}"
        )
    try:
        entries = reasoning_gym.create_dataset(
            generator, seed=seed, size=OVERSAMPLING * sum(sizes.values()), **dict(settings)
        )
    except (
        TypeError,
        AssertionError,
    ) as error:  # how reasoning-gym refuses unknown settings and bad values
        raise ValueError(
            f"{name}: reasoning-gym refuses --generator-config {json.dumps(settings)}: {error}"
        ) from error
    splits = distinct_splits(
        (entries[i] for i in range(len(entries))),
        sizes,
        lambda entry: entry["question"],
        "--generator-config",
    )
    return {
        split: [_row(name, entry, template, i, split) for i, entry in enumerate(es)]
        for split, es in splits.items()
    }


def _row(name: str, entry: Mapping[str, Any], template: Template, index: int, split: str) -> Row:
    answer = str(entry["answer"])
    text = dump_entry(entry)
    score = scorer(name.removeprefix(SOURCE_PREFIX))
    if score(answer, load_entry(text)) != score(answer, entry):
        raise ValueError(
            f"{name}: its scorer judges the reference answer of problem {index} otherwise once the "
            "entry was JSON"
        )
    return make_row(
        name, entry["question"], template, answer, "reasoning", index=index, split=split,
        entry=text,
    )  # fmt: skip


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    partial_credit: bool = True,
    **_: Any,
) -> dict[str, float]:
    """Reward of one response, by reasoning-gym's scorer.

    verl calls it through ``reward.custom_reward_function``.

    Args:
        data_source: ``reasoning_gym/<generator>``.
        solution_str: the decoded response.
        ground_truth: reasoning-gym's reference answer; the scorer reads it from the entry, which
            carries more.
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
        raise ValueError("extra_info.entry is missing: write the data with capo-verl data")
    score = float(
        scorer(data_source[len(SOURCE_PREFIX) :])(solution_str, load_entry(extra_info["entry"]))
    )
    acc = float(score >= 1.0)
    return {"score": score if partial_credit else acc, "acc": acc}


@lru_cache(maxsize=8)
def scorer(generator: str) -> Any:
    """reasoning-gym's scorer: (answer, entry) to a number in [0, 1]."""
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(generator)
