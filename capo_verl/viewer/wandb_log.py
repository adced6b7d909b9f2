# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases' offline file ``run-ID.wandb``: metrics, configuration and name of the run.

The file is a LevelDB log: blocks of 32 KiB with records of a CRC-32 of type and content (4 bytes),
a length (2) and a type (1: whole; 2, 3, 4: first, middle and last part), after 7 bytes that name
the format. A record
is a protobuf message ``wandb_internal.Record``.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from capo_verl.viewer.config import settings
from capo_verl.viewer.notes import reason, spans
from capo_verl.viewer.series import Series, collect, step_number

SUFFIX = ".wandb"
MAGIC, START = b":W&B", 7
BLOCK, HEADER = 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class WandbRun(NamedTuple):
    """Contents of the file."""

    name: str | None
    series: dict[str, Series]
    config: dict[str, Any] | None


def read_wandb(path: Path, notes: list[str]) -> WandbRun:
    """A run that was logged offline. A file that is still being written is read as far as it goes.

    A damaged record is left out, with a note.

    Raises:
        ValueError: if it is no such file, or the package ``wandb`` is missing.
    """
    try:
        from google.protobuf.message import DecodeError
        from wandb.proto import wandb_internal_pb2
    except ImportError as e:
        raise ValueError(
            f"{path}: reading this file needs the package wandb ({e}); pip install wandb"
        ) from e
    name: str | None = None
    config: dict[str, Any] = {}
    rows: list[tuple[int, dict[str, Any]]] = []
    damaged: list[int] = []
    for number, content in _records(path.read_bytes(), path, damaged):
        try:
            record = wandb_internal_pb2.Record.FromString(content)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                name = record.run.display_name or name
            if kind in ("run", "config"):
                update = record.run.config if kind == "run" else record.config
                config.update({_key(item): json.loads(item.value_json) for item in update.update})
            if kind == "history":
                data = {_key(item): json.loads(item.value_json) for item in record.history.item}
                rows.append((step_number(data.get("_step", record.history.step.num)), data))
        except (DecodeError, ValueError, RecursionError):
            damaged.append(number)
    if damaged:
        notes.append(f"{path}: damaged and left out: record {spans(damaged)}")
    try:
        known = settings({k: v for k, v in config.items() if not k.startswith("_wandb")})
    except ValueError as e:
        notes.append(f"{path}: its configuration cannot be read ({reason(e)})")
        known = {}
    found = {key: series for key, series in collect(rows).items() if not key.startswith("_")}
    return WandbRun(name, found, known or None)


def _key(item: Any) -> str:
    return str(item.key or ".".join(item.nested_key))


def _records(content: bytes, path: Path, damaged: list[int]) -> Iterator[tuple[int, bytes]]:
    """Records with their numbers, from 1; those of damaged ones go into ``damaged``.

    Where a part is damaged, reading goes on in the next block, as LevelDB does.
    """
    if content[:4] != MAGIC:
        raise ValueError(
            f"{path}: not a file of wandb (it does not begin with {MAGIC.decode()}); give the "
            "run's .wandb file"
        )
    at, number, parts = START, 1, b""
    begun = False  # within a record of several parts
    while at + HEADER.size <= len(content):
        block_end = at + BLOCK - at % BLOCK
        if block_end - at < HEADER.size:  # the rest of a block is padding
            at = block_end
            continue
        checksum, length, kind = HEADER.unpack_from(content, at)
        start, end = at + HEADER.size, at + HEADER.size + length
        if len(content) < end <= block_end:
            return  # still being written
        if end > block_end or zlib.crc32(content[start:end], zlib.crc32(bytes([kind]))) != checksum:
            damaged.append(number)
            at, number, begun = block_end, number + 1, False
            continue
        at = end
        if kind in (WHOLE, FIRST):
            parts, begun = b"", True
        if not begun:
            continue  # the rest of a record that began in what was damaged
        parts += content[start:end]
        if kind in (WHOLE, LAST):
            yield number, parts
            number, begun = number + 1, False
