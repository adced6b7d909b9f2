# SPDX-License-Identifier: Apache-2.0
"""What is printed and plotted are the numbers verl logged."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from capo_verl.cpu.quickstart.display import Display
from capo_verl.cpu.quickstart.records import Record, new_records
from capo_verl.viewer.file_log import FileLog, parse
from tests.cpu.quickstart.recorded import (
    COMPLETIONS_PER_STEP,
    GRPO,
    POLICY_SHIFT,
    REJECTION,
    write_capo,
)


@pytest.fixture
def capo(tmp_path):
    return new_records(FileLog(write_capo(tmp_path / "capo.jsonl")))


def shown(records, terminal: bool = False) -> str:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=terminal, width=60, color_system=None))
    for record in records:
        display.step(record, record.step * COMPLETIONS_PER_STEP, 80)
    return out.getvalue()


def test_records_are_verls_numbers(capo):
    lines = [json.loads(line) for line in GRPO.read_text().splitlines()]
    assert [r.step for r in capo] == [line["step"] for line in lines] == list(range(7))
    for record, line in zip(capo, lines, strict=True):
        data = line["data"]
        assert record.train_accuracy == data.get("critic/score/mean")
        assert record.held_out_accuracy == data.get(
            "val-core/reasoning_gym/spell_backward/acc/mean@1"
        )
        assert record.seconds == data.get("perf/time_per_step")
        assert record.rejection_rate == REJECTION.get(record.step)
        assert record.policy_shift == POLICY_SHIFT.get(record.step)
    assert [r.step for r in capo if r.held_out_accuracy is not None] == [0, 5]


def test_one_line_per_step_with_every_number(capo):
    header, *lines = shown(capo).splitlines()
    assert header.split() == [
        "step",
        "completions",
        "training",
        "held-out",
        "rejected",
        "m_F",
        "s/step",
    ]
    assert len(lines) == 7
    assert lines[0].split() == ["0/80", "0", "-", "0.355", "-", "-", "-"]
    last = capo[5]
    expected = [
        "5/80", "640", f"{last.train_accuracy:.3f}", f"{last.held_out_accuracy:.3f}", "1.00%",
        "2.0e-05", f"{last.seconds:.1f}",
    ]  # fmt: skip
    assert lines[5].split() == expected


def test_grpo_has_dashes_where_capo_has_numbers():
    cells = shown(new_records(FileLog(GRPO))).splitlines()[2].split()
    assert cells[4:6] == ["-", "-"]


def test_without_a_terminal_there_are_plain_lines_only(capo):
    out = io.StringIO()
    display = Display(Console(file=out))
    with display.phase("Data") as phase:
        phase.update(0.5, "half")
        phase.summary = "kept in /somewhere/with a long path/" + "x" * 100
    with display.phase("Start") as phase:
        phase.ok = False
    display.step(capo[1], 128, 80)
    text = out.getvalue()
    assert "\x1b" not in text and "\r" not in text
    lines = text.splitlines()
    assert lines[0] == "Data ..."
    assert lines[1].startswith("done: Data 0 s (kept in /somewhere")
    assert lines[3].startswith("failed: Start")
    assert len(lines) == 6


def test_a_terminal_shows_bar_and_lines(capo):
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=100))
    with display.phase("RL") as phase:
        phase.update(0.5, "step 1/2")
        display.step(capo[1], 128, 80)
    text = out.getvalue()
    assert "step 1/2" in text and "✓" in text and "1/80" in text


def test_markup_in_text_is_printed_as_it_is():
    out = io.StringIO()
    Display(Console(file=out)).say("data.files=[a,b] [red]")
    assert out.getvalue() == "data.files=[a,b] [red]\n"


def test_tail_waits_for_the_end_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = FileLog(path)
    assert new_records(log) == []
    first, second = GRPO.read_bytes().splitlines(keepends=True)[:2]
    path.write_bytes(first + second[:30])
    assert [r.step for r in new_records(log)] == [0]
    assert new_records(log) == []
    path.write_bytes(first + second)
    assert [r.step for r in new_records(log)] == [1]


def test_nan_is_not_a_number_to_show():
    entry = parse('{"step": 3, "data": {"critic/score/mean": null, "capo/rejection_rate": 0.5}}')
    assert Record.of(entry) == Record(step=3, rejection_rate=0.5)


@pytest.mark.parametrize(
    "line", ["", "{}", "[]", "nonsense", '{"step": 1}', '{"step": 1, "data": 3}']
)
def test_foreign_lines_are_refused(line):
    with pytest.raises(ValueError, match="not a line of verl's file logger"):
        parse(line)
