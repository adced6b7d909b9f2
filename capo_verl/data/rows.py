# SPDX-License-Identifier: Apache-2.0
"""Records of a data set as rows of verl's schema, and the check of every row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capo_verl.data.datasets import DataSet
from capo_verl.data.rewards.extraction import last_box
from capo_verl.data.templates import Template

Record = Mapping[str, Any]
Row = dict[str, Any]

QUANTITY = re.compile(r"(-?[\d,]*\.?\d+)(\s[^\d]*)?")
EXTRA_INFO = {"index": int, "split": str, "answer_format": str, "id": str, "entry": str}
"""Keys and types of ``extra_info``: the same in every file, so that verl can join files."""


def math_rows(
    dataset: DataSet, records: Iterable[Record], split: str, template: Template, origin: str
) -> list[Row]:
    """Rows of verl's schema, in the order of the records.

    Args:
        origin: what the records were read from, for errors.

    Raises:
        ValueError: naming the record and the column that is missing or empty, or whose answer
            cannot be read.
    """
    rows: list[Row] = []
    for number, record in enumerate(records):
        place = f"{origin}, record {number}"
        if any(str(record.get(key)) != value for key, value in dataset.where.items()):
            continue
        context = [str(record[c]).strip() for c in dataset.context if record.get(c)]
        question = "\n".join(
            [*context, str(_column(record, dataset.question, "question", place)).strip()]
        )
        answer = read_answer(
            _column(record, dataset.answer, "answer", place), dataset.answer_form, place
        )
        identity = next(
            (
                str(record[key])
                for key in ("id", "unique_id", "id_orig")
                if record.get(key) is not None
            ),
            "",
        )
        rows.append(
            make_row(
                dataset.data_source,
                question,
                template,
                answer,
                "math",
                index=len(rows),
                split=split,
                identity=identity,
            )
        )
    return rows


def make_row(
    data_source: str, question: str, template: Template, answer: str, ability: str,
    *, index: int, split: str, identity: str = "", entry: str = "",
) -> Row:  # fmt: skip
    """One row of verl's schema. ``entry`` is a reasoning-gym entry as JSON, for its scorer."""
    return {
        "data_source": data_source,
        "prompt": template.messages(question),
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {
            "index": index, "split": split, "answer_format": template.answer_format, "id": identity,
            "entry": entry,
        },
    }  # fmt: skip


def question_of(row: Row) -> str:
    """The user's question in a row."""
    return str(row["prompt"][-1]["content"])


def _column(record: Record, names: Sequence[str], what: str, place: str) -> Any:
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ValueError(
        f"{place}: no {what} in column {' or '.join(names)}; it has "
        f"{', '.join(sorted(map(str, record)))}"
    )


def read_answer(value: Any, form: str, place: str) -> str:
    """The reference answer as text. Lists are joined by commas; 27.0 becomes 27.

    Raises:
        ValueError: if there is no answer of that form.
    """
    if not isinstance(value, (str, int, float)):  # OlympiadBench keeps lists; parquet yields arrays
        value = ", ".join(map(str, value))
    text = str(value).strip()
    if form == "boxed":
        text = last_box(text) or ""
    elif form == "hashes":
        text = text.rpartition("####")[2].strip().replace(",", "") if "####" in text else ""
    elif form == "quantity":
        match = QUANTITY.fullmatch(text)
        text = match[1] if match else text
    text = text.strip()
    if text.startswith("$") and text.endswith("$") and text.count("$") == 2:
        text = text[1:-1].strip()
    text = re.sub(r"^(-?\d+)\.0$", r"\1", text)
    if not text:
        raise ValueError(f"{place}: no answer of the form {form!r} in {str(value)[-80:]!r}")
    return text


def check_rows(rows: Sequence[Mapping[str, Any]], origin: str) -> None:
    """Every row against verl's schema, as this package writes it.

    Raises:
        ValueError: naming the file, the row, the field, what was found and what is expected.
    """
    if not rows:
        raise ValueError(f"{origin}: no rows")
    for number, row in enumerate(rows):
        for field, problem in _problems(row):
            raise ValueError(f"{origin}, row {number}, {field}: {problem}")


def _problems(row: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name in ("data_source", "ability"):
        if not _is_text(row.get(name)):
            yield name, f"{row.get(name)!r} is not a non-empty string"
    prompt: Any = row.get("prompt")  # a list, or an array where parquet was read
    if isinstance(prompt, (str, bytes)) or not hasattr(prompt, "__len__") or not len(prompt):
        yield "prompt", f"{_short(prompt)} is not a list of chat messages"
    else:
        for i, message in enumerate(prompt):
            if not isinstance(message, Mapping) or message.get("role") not in (
                "system",
                "user",
                "assistant",
            ):
                yield (
                    f"prompt[{i}].role",
                    f"{_short(message)} has no role system, user or assistant",
                )
            elif not _is_text(message.get("content")):
                yield (
                    f"prompt[{i}].content",
                    f"{_short(message.get('content'))} is not a non-empty string",
                )
        if isinstance(prompt[-1], Mapping) and prompt[-1].get("role") != "user":
            yield "prompt", "the last message is not the user's"
    reward = row.get("reward_model")
    if not isinstance(reward, Mapping) or reward.get("style") != "rule":
        yield "reward_model.style", f"{_short(reward)} has not style 'rule'"
    elif not _is_text(reward.get("ground_truth")):
        yield (
            "reward_model.ground_truth",
            f"{_short(reward.get('ground_truth'))} is not a non-empty string",
        )
    extra = row.get("extra_info")
    if not isinstance(extra, Mapping):
        yield "extra_info", f"{_short(extra)} is not a mapping"
    else:
        for key, kind in EXTRA_INFO.items():
            if not isinstance(extra.get(key), kind):
                yield (
                    f"extra_info.{key}",
                    f"{_short(extra.get(key))} is not of type {kind.__name__}",
                )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
