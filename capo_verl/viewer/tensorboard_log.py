# SPDX-License-Identifier: Apache-2.0
"""Event files of verl's ``tensorboard`` logger: scalars by metric name.

A file is a sequence of records: a length (8 bytes), its checksum (4), so many bytes, which are a
protobuf message ``Event``, and their checksum (4). TensorBoard's own reader stops at the first
record that is damaged; this one goes on behind it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from capo_verl.viewer.notes import spans
from capo_verl.viewer.series import Series, collect, step_number

PREFIX = "events.out.tfevents."
HEADER, CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
SEARCHED = 1 << 20
"""Bytes behind a damaged length in which the next record is looked for."""


def is_event_file(path: Path) -> bool:
    return path.name.startswith(PREFIX)


def read_event_files(paths: list[Path], notes: list[str]) -> dict[str, Series]:
    """All scalars of a folder's event files, one file per start of the run.

    The later start wins where steps repeat. A damaged record is left out, with a note.

    Raises:
        ValueError: if the package ``tensorboard`` is missing.
    """
    try:
        from google.protobuf.message import DecodeError
        from tensorboard.compat.proto.event_pb2 import Event
    except ImportError as e:
        raise ValueError(
            f"{paths[0]}: reading event files needs the package tensorboard ({e}); pip install "
            "tensorboard"
        ) from e

    def rows() -> Iterator[tuple[int, dict[str, float]]]:
        for path in sorted(paths):
            damaged: list[int] = []
            for number, content in _records(path.read_bytes(), damaged):
                try:
                    event = Event.FromString(content)
                    step = step_number(event.step)
                except (DecodeError, ValueError):
                    damaged.append(number)
                    continue
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        yield step, {value.tag: value.simple_value}
            if damaged:
                notes.append(f"{path}: damaged and left out: record {spans(damaged)}")

    return collect(rows())


def _records(content: bytes, damaged: list[int]) -> Iterator[tuple[int, bytes]]:
    """Records with their numbers, from 1.

    Without the last one if it is still being written. The numbers of damaged ones go into
    ``damaged``; where a length is damaged, what lies before the next record counts as one.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    def length_at(at: int) -> int | None:
        length, checksum = HEADER.unpack_from(content, at)
        known = length <= len(content) and masked_crc32c(content[at : at + 8]) == checksum
        return int(length) if known else None

    at = number = 0
    while at + HEADER.size <= len(content):
        number += 1
        length = length_at(at)
        if length is None:
            damaged.append(number)
            last = min(at + SEARCHED, len(content) - HEADER.size)
            found = (i for i in range(at + 1, last + 1) if length_at(i) is not None)
            at = next(found, len(content))
            continue
        start, end = at + HEADER.size, at + HEADER.size + length
        if end + CHECKSUM.size > len(content):
            return  # still being written
        at = end + CHECKSUM.size
        if CHECKSUM.unpack_from(content, end)[0] == masked_crc32c(content[start:end]):
            yield number, content[start:end]
        else:
            damaged.append(number)
