# SPDX-License-Identifier: Apache-2.0
"""Rows for any of reasoning-gym's generators."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from capo_verl.data.rows import Row, make_row
from capo_verl.data.templates import Template
from capo_verl.quickstart.task import SOURCE_PREFIX, distinct_splits, dump_entry, load_entry, scorer

OVERSAMPLING = 4
"""Problems generated per problem asked for: generators repeat themselves."""


def gym_rows(
    name: str, sizes: Mapping[str, int], seed: int, settings: Mapping[str, Any], template: Template
) -> dict[str, list[Row]]:
    """Rows by split, no question twice.

    Args:
        name: ``reasoning_gym/GENERATOR``.
        sizes: problems per split; a split does not depend on those behind it.
        settings: of the generator.

    Raises:
        ValueError: for a generator or a setting that does not exist, and if it has fewer distinct problems.
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
            f"reasoning-gym has no generator {generator!r}: {'close: ' + ', '.join(close) if close else ''}"
        )
    try:
        entries = reasoning_gym.create_dataset(
            generator, seed=seed, size=OVERSAMPLING * sum(sizes.values()), **dict(settings)
        )
    except (TypeError, AssertionError) as error:  # how reasoning-gym refuses unknown settings and bad values
        raise ValueError(f"{name}: reasoning-gym refuses --generator-config {json.dumps(settings)}: {error}") from error
    splits = distinct_splits(
        (entries[i] for i in range(len(entries))), sizes, lambda entry: entry["question"], "--generator-config"
    )
    return {
        split: [_row(name, entry, template, i, split) for i, entry in enumerate(es)] for split, es in splits.items()
    }


def _row(name: str, entry: Mapping[str, Any], template: Template, index: int, split: str) -> Row:
    answer = str(entry["answer"])
    text = dump_entry(entry)
    score = scorer(name.removeprefix(SOURCE_PREFIX))
    if score(answer, load_entry(text)) != score(answer, entry):
        raise ValueError(
            f"{name}: its scorer judges the reference answer of problem {index} otherwise once the entry was JSON"
        )
    return make_row(
        name, entry["question"], template, answer, "reasoning", index=index, split=split, entry=text,
    )  # fmt: skip
