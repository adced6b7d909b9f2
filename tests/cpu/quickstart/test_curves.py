# SPDX-License-Identifier: Apache-2.0
"""The figure plots the recorded numbers, and says so where there are none."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from capo_verl.cpu.quickstart import curves
from capo_verl.cpu.quickstart.records import new_records
from capo_verl.viewer.file_log import FileLog
from tests.cpu.quickstart.recorded import (
    COMPLETIONS_PER_STEP,
    GRPO,
    POLICY_SHIFT,
    REJECTION,
    write_capo,
)


def points(line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def expected(values: dict[int, float], scale: float = 1) -> list[tuple[float, float]]:
    return [(step * COMPLETIONS_PER_STEP, value * scale) for step, value in values.items()]


def test_three_panels_with_the_recorded_numbers(tmp_path):
    records = new_records(FileLog(write_capo(tmp_path / "capo.jsonl")))
    accuracy, rejection, shift = curves.draw(records, COMPLETIONS_PER_STEP, "CAPO").axes
    lines = {line.get_label(): points(line) for line in accuracy.lines}
    assert lines["held-out problems"] == expected(
        {r.step: r.held_out_accuracy for r in records if r.step in (0, 5)}
    )
    assert lines["training batch"] == expected(
        {r.step: r.train_accuracy for r in records if r.step > 0}
    )
    assert points(rejection.lines[0]) == expected(REJECTION, 100)
    assert points(shift.lines[0]) == expected(POLICY_SHIFT)
    assert shift.get_yscale() == "log"
    assert shift.get_xlabel() == "completions"


def test_grpo_panels_say_that_nothing_was_measured():
    records = new_records(FileLog(GRPO))
    accuracy, rejection, shift = curves.draw(records, COMPLETIONS_PER_STEP, "GRPO").axes
    assert len(accuracy.lines) == 2
    for panel in (rejection, shift):
        assert not panel.lines
        assert [text.get_text() for text in panel.texts] == [curves.NOT_MEASURED]


def test_writes_a_png(tmp_path):
    curves.save(new_records(FileLog(GRPO)), COMPLETIONS_PER_STEP, "GRPO", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_any_record_can_be_drawn():
    assert len(curves.draw([], COMPLETIONS_PER_STEP, "empty").axes) == 3
