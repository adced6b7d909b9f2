# SPDX-License-Identifier: Apache-2.0
"""What verl's ``file`` logger wrote: one JSON object per step, read while the run is still
writing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT_ACCURACY = re.compile(r"val-core/.+/acc/mean@\d+")


@dataclass(frozen=True)
class Record:
    """One line of the metrics file.

    None: not logged at this step (or never, as CAPO's metrics in a GRPO run).
    """

    step: int
    """0 is the validation before training."""
    train_accuracy: float | None = None
    """Mean reward of the step's completions; the accuracy, as the quickstart's reward is all or
    nothing.
    """
    held_out_accuracy: float | None = None
    rejection_rate: float | None = None
    """Share of response tokens the filter dropped."""
    policy_shift: float | None = None
    """Mean m_F of the response tokens before filtering."""
    seconds: float | None = None
    """Duration of the step without validation."""
    filter_share: float | None = None
    """Share of the actor's update that was spent in the filter."""

    @classmethod
    def from_json(cls, line: str | bytes) -> Record:
        """
        Raises:
            ValueError: if the line is not one of verl's.
        """
        try:
            entry = json.loads(line)
            step, data = int(entry["step"]), entry["data"]
            in_filter, update = (
                _number(data, "capo/filter_seconds"),
                _number(data, "timing_s/update_actor"),
            )
            return cls(
                step=step,
                train_accuracy=_number(data, "critic/score/mean"),
                held_out_accuracy=_held_out(data),
                rejection_rate=_number(data, "capo/rejection_rate"),
                policy_shift=_number(data, "capo/policy_shift_mean"),
                seconds=_number(data, "perf/time_per_step"),
                filter_share=in_filter / update if in_filter is not None and update else None,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(
                f"not a line of verl's file logger ({type(e).__name__}: {e}): {line[:80]!r}"
            ) from e


def read_records(path: Path) -> list[Record]:
    """All complete lines of a metrics file."""
    return RecordTail(path).new_records()


class RecordTail:
    """Reads a growing metrics file; a line still being written is left for the next call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new_records(self) -> list[Record]:
        """Records that were completed since the last call; none while the file does not exist."""
        try:
            with self._path.open("rb") as f:
                f.seek(self._offset)
                complete, newline, _ = f.read().rpartition(b"\n")
        except FileNotFoundError:
            return []
        self._offset += len(complete) + len(newline)
        return [Record.from_json(line) for line in complete.splitlines() if line.strip()]


def _number(data: dict[str, Any], key: str) -> float | None:
    value = data.get(key)  # verl writes NaN as null
    return None if value is None else float(value)


def _held_out(data: dict[str, Any]) -> float | None:
    values = [float(v) for k, v in data.items() if HELD_OUT_ACCURACY.fullmatch(k) and v is not None]
    return sum(values) / len(values) if values else None
