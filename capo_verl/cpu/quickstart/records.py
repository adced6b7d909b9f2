# SPDX-License-Identifier: Apache-2.0
"""The quickstart's metrics, of what verl's ``file`` logger writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from capo_verl.viewer.file_log import Entry, FileLog

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
    def of(cls, entry: Entry) -> Record:
        """The record of a line."""
        data = entry.data
        in_filter = _number(data, "capo/filter_seconds")
        update = _number(data, "timing_s/update_actor")
        return cls(
            step=entry.step,
            train_accuracy=_number(data, "critic/score/mean"),
            held_out_accuracy=held_out_accuracy(data),
            rejection_rate=_number(data, "capo/rejection_rate"),
            policy_shift=_number(data, "capo/policy_shift_mean"),
            seconds=_number(data, "perf/time_per_step"),
            filter_share=in_filter / update if in_filter is not None and update else None,
        )


def new_records(log: FileLog) -> list[Record]:
    """Records that were completed since the last call."""
    return [Record.of(entry) for entry in log.new_entries()]


def _number(data: dict[str, Any], key: str) -> float | None:
    value = data.get(key)  # verl writes NaN as null
    return None if value is None else float(value)


def held_out_accuracy(data: dict[str, Any]) -> float | None:
    """Mean over the test files of a line's metrics; None if it is no validation's."""
    values = [float(v) for k, v in data.items() if HELD_OUT_ACCURACY.fullmatch(k) and v is not None]
    return sum(values) / len(values) if values else None
