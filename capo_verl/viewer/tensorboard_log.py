# SPDX-License-Identifier: Apache-2.0
"""Event files of verl's ``tensorboard`` logger: scalars by metric name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from capo_verl.viewer.series import Series, collect

PREFIX = "events.out.tfevents."


def is_event_file(path: Path) -> bool:
    return path.name.startswith(PREFIX)


def read_event_files(paths: list[Path]) -> dict[str, Series]:
    """All scalars of a folder's event files, one file per start of the run.

    The later start wins where steps repeat.

    Raises:
        ValueError: if the package ``tensorboard`` is missing.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
    except ImportError as e:
        raise ValueError(
            f"{paths[0]}: reading event files needs the package tensorboard ({e}); pip install "
            "tensorboard"
        ) from e

    def rows() -> Iterator[tuple[int, dict[str, float]]]:
        for path in sorted(paths):
            keep_all = {SCALARS: 0}  # by default it keeps a sample
            events = EventAccumulator(str(path), size_guidance=keep_all)
            events.Reload()
            for key in events.Tags()[SCALARS]:
                for event in events.Scalars(key):
                    yield event.step, {key: event.value}

    return collect(rows())
