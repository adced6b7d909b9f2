# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases' offline file ``run-ID.wandb``: metrics, configuration and name of the run.

The file is a LevelDB log: blocks of 32 KiB with records of a checksum (4 bytes), a length (2) and a
type (1: whole; 2, 3, 4: first, middle and last part), after 7 bytes that name the format. A record
is a protobuf message ``wandb_internal.Record``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from capo_verl.viewer.config import flatten
from capo_verl.viewer.series import Series, collect

SUFFIX = ".wandb"
MAGIC = b":W&B"
BLOCK, HEADER = 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class WandbRun(NamedTuple):
    """Contents of the file."""

    name: str | None
    series: dict[str, Series]
    config: dict[str, Any] | None


def read_wandb(path: Path) -> WandbRun:
    """A run that was logged offline. A file that is still being written is read as far as it goes.

    Raises:
        ValueError: if it is no such file, or the package ``wandb`` is missing.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as e:
        raise ValueError(
            f"{path}: reading this file needs the package wandb ({e}); pip install wandb"
        ) from e
    name: str | None = None
    config: dict[str, Any] = {}
    rows: list[tuple[int, dict[str, Any]]] = []
    for content in _records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            name = record.run.display_name or name
        if kind in ("run", "config"):
            update = record.run.config if kind == "run" else record.config
            config.update({_key(item): json.loads(item.value_json) for item in update.update})
        if kind == "history":
            data = {_key(item): json.loads(item.value_json) for item in record.history.item}
            rows.append((int(data.get("_step", record.history.step.num)), data))
    own = {key: value for key, value in flatten(config).items() if not key.startswith("_wandb")}
    found = {key: series for key, series in collect(rows).items() if not key.startswith("_")}
    return WandbRun(name, found, own or None)


def _key(item: Any) -> str:
    return str(item.key or ".".join(item.nested_key))


def _records(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    if content[:4] != MAGIC:
        raise ValueError(
            f"{path}: not a file of wandb (it does not begin with {MAGIC.decode()}); give the "
            "run's .wandb file"
        )
    at, parts = 7, b""
    while at + HEADER.size <= len(content):
        if BLOCK - at % BLOCK < HEADER.size:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, at)
        at += HEADER.size
        if at + length > len(content) or kind not in (WHOLE, FIRST, MIDDLE, LAST):
            return  # still being written
        parts = (
            content[at : at + length]
            if kind in (WHOLE, FIRST)
            else parts + content[at : at + length]
        )
        at += length
        if kind in (WHOLE, LAST):
            yield parts
