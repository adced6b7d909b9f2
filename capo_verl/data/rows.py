# SPDX-License-Identifier: Apache-2.0
"""Records of a data set as rows of verl's schema, and the check of every row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from capo_verl.data.datasets import DataSet
from capo_verl.data.rewards.extraction import last_box
from capo_verl.data.schema import Problems, chat_problems, key_of, reward_problems
from capo_verl.data.templates import Messages, Template
from capo_verl.data.values import is_empty, is_text, plain, short, text_of

Record = Mapping[str, Any]
Row = dict[str, Any]

PROMPT, REWARD = "prompt", "reward_model"
"""Columns of verl's schema with the question and the answer."""
THOUSANDS = re.compile(r"[^\d\s(\[{]{0,2}\d{1,3}(,\d{3})+(\.\d+)?[^\d\s]*")
QUANTITY = re.compile(r"(-?[\d,]*\.?\d+)(\s[^\d]*)?")
EXTRA_INFO = {"index": int, "split": str, "answer_format": str, "id": str, "entry": str}
"""Keys and types of ``extra_info``: the same in every file, so that verl can join files."""


def math_rows(
    dataset: DataSet, records: Iterable[Record], split: str, template: Template, origin: str
) -> list[Row]:
    """Rows of verl's schema, in the order of the records.

    A question that is a list of chat messages is the prompt as it is. A record that is in verl's
    schema already (``prompt``, ``reward_model``) keeps its ``data_source``, ``ability`` and
    ``extra_info``, too.

    Args:
        origin: what the records were read from, for errors.

    Raises:
        ValueError: naming the record and the column that is missing or empty, or whose value
            cannot be read.
    """
    rows: list[Row] = []
    for number, record in enumerate(records):
        place = f"{origin}, record {number}"
        if any(str(record.get(key)) != value for key, value in dataset.where.items()):
            continue
        asked = _column(record, dataset.question, PROMPT, "question", place)
        answered = _column(record, dataset.answer, REWARD, "answer", place)
        row = make_row(
            dataset.data_source,
            _question(record, dataset, asked, place),
            template,
            read_answer(record[answered], dataset.answer_form, f"{place}, column {answered}"),
            "math",
            index=len(rows),
            split=split,
            identity=_identity(record, place),
        )
        if (asked, answered) == (PROMPT, REWARD):
            _keep(record, row, place)
        rows.append(row)
    return rows


def _question(record: Record, dataset: DataSet, column: str, place: str) -> str | Messages:
    """The question with its context, or the chat messages that it is."""
    context = [
        text_of(record[c], f"{place}, column {c}")
        for c in dataset.context
        if not is_empty(record.get(c))
    ]
    question = plain(record[column])
    if not isinstance(question, list) or not any(isinstance(m, Mapping) for m in question):
        return "\n".join([*context, text_of(question, f"{place}, column {column}")])
    for field, problem in chat_problems(question):
        raise ValueError(f"{place}, column {column}{field}: {problem}")
    if context:
        raise ValueError(
            f"{place}, column {column}: a list of messages has no room for the column "
            f"{dataset.context[0]}: leave one of them out"
        )
    # A parquet file has every key of any message in all of them.
    return [{key: value for key, value in m.items() if value is not None} for m in question]


def _identity(record: Record, place: str) -> str:
    """The record's own name, or nothing."""
    for key in ("id", "unique_id", "id_orig"):
        if isinstance(record.get(key), (str, int, float)) and not is_empty(record[key]):
            return text_of(record[key], f"{place}, column {key}")
    return ""


def _keep(record: Record, row: Row, place: str) -> None:
    """Give a row what its record in verl's schema has besides question and answer."""
    for key in ("data_source", "ability"):
        if not is_empty(record.get(key)):
            row[key] = record[key]
    extra = record.get("extra_info")
    if is_empty(extra):
        return
    if not isinstance(extra, Mapping):
        raise ValueError(f"{place}, column extra_info: {short(extra)} is not an object")
    # Parquet has no objects without keys; verl's trainer takes a missing one for empty.
    kept = {
        key: value
        for key, value in extra.items()
        if not (value is None or (isinstance(value, Mapping) and not value))
    }
    if "index" in kept and not isinstance(kept["index"], int):  # a name, as in DAPO's data
        kept.setdefault("id", text_of(kept.pop("index"), f"{place}, column extra_info.index"))
    row["extra_info"] |= kept


def make_row(
    data_source: str, question: str | Messages, template: Template, answer: str, ability: str,
    *, index: int, split: str, identity: str = "", entry: str = "",
) -> Row:  # fmt: skip
    """One row of verl's schema.

    Args:
        question: text for the template, or messages that are the prompt.
        entry: a reasoning-gym entry as JSON, for its scorer.
    """
    return {
        "data_source": data_source,
        "prompt": template.messages(question) if isinstance(question, str) else question,
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


def _column(record: Record, names: Sequence[str], schemas: str, what: str, place: str) -> str:
    """The first of the columns that has a value; ``schemas`` is that of verl's schema."""
    for name in (*names, schemas):
        if not is_empty(record.get(name)):
            return name
    there = [name for name in (*names, schemas) if name in record]
    if there:
        raise ValueError(f"{place}, column {there[0]}: no {what}, it is empty")
    raise ValueError(
        f"{place}: no {what} in column {' or '.join(names)}; it has "
        f"{', '.join(sorted(map(str, record)))}: name it by --{what}-column"
    )


def read_answer(value: Any, form: str, place: str) -> str:
    """The reference answer as text. Lists are joined by commas; 27.0 becomes 27.

    Args:
        value: text, a number, a list of such, or a ``reward_model``, whose ``ground_truth`` is
            taken as it is.
        form: of :attr:`capo_verl.data.datasets.DataSet.answer_form`.
        place: file, record and column, for errors.

    Raises:
        ValueError: if there is no answer of that form.
    """
    value = plain(value)
    if isinstance(value, Mapping) and "ground_truth" in value:
        return _ground_truth(value["ground_truth"], f"{place}.ground_truth")
    if isinstance(value, (list, tuple)):
        found = [_formed(text_of(v, f"{place}[{i}]"), form) for i, v in enumerate(value)]
        text = ", ".join(found) if all(found) else ""
    else:
        text = _formed(text_of(value, place), form)
    if text.startswith("$") and text.endswith("$") and text.count("$") == 2:
        text = text[1:-1].strip()
    text = re.sub(r"^(-?\d+)\.0$", r"\1", text)
    if not text:
        raise ValueError(f"{place}: no answer of the form {form!r} in {str(value)[-80:]!r}")
    return text


def _ground_truth(value: Any, place: str) -> str:
    value = plain(value)
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise ValueError(f"{place}: {short(value)} has {len(value)} values: one is expected")
        (value,) = value
    return text_of(value, place)


def _formed(text: str, form: str) -> str:
    """The answer in a text of that form, or nothing."""
    if form == "boxed":
        return last_box(text) or ""
    if form == "hashes":
        answer = text.rpartition("####")[2].strip() if "####" in text else ""
        answer = answer.partition("\n")[0].strip()
        return answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer
    match = QUANTITY.fullmatch(text) if form == "quantity" else None
    return (match[1] if match else text).strip()


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


def _problems(row: Mapping[str, Any]) -> Problems:
    yield from reward_problems(row)
    if not is_text(row.get("ability")):
        yield "ability", f"{short(row.get('ability'))} is not a non-empty string"
    for field, problem in chat_problems(row.get("prompt")):
        yield f"prompt{field}", problem
    if key_of(row.get("reward_model"), "style") != "rule":
        yield "reward_model.style", f"{short(row.get('reward_model'))} has not style 'rule'"
    extra = row.get("extra_info")
    if not isinstance(extra, Mapping):
        yield "extra_info", f"{short(extra)} is not a mapping"
    else:
        for key, kind in EXTRA_INFO.items():
            if not isinstance(extra.get(key), kind) or isinstance(extra[key], bool):
                yield (
                    f"extra_info.{key}",
                    f"{short(extra.get(key))} is not of type {kind.__name__}",
                )
