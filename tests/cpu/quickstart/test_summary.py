# SPDX-License-Identifier: Apache-2.0
"""The closing table."""

from __future__ import annotations

from capo_verl.cpu.quickstart.records import Record
from capo_verl.cpu.quickstart.summary import summarise
from capo_verl.viewer.file_log import Entry


def test_rows_of_a_capo_run_and_of_a_grpo_run():
    records = [
        Record(0, held_out_accuracy=0.25),
        Record(1, 0.3, None, 0.02, 1e-4, 2.0, 0.05),
        Record(2, 0.5, 0.75, 0.04, 3e-4, 4.0, 0.01),
        Record(3, 0.7, None, 0.0, 2e-4, 3.0, 0.03),
    ]
    assert summarise(records, 128) == [
        ("completions", "384 in 3 steps"),
        ("held-out accuracy", "0.250 -> 0.750"),
        ("training accuracy, last 5 steps", "0.500"),
        ("rejected tokens", "mean 2.00%, most 4.00%"),
        ("m_F per token", "mean 2.0e-04"),
        ("seconds per step", "median 3.0"),
        ("filter's share of the update", "median 3.0%"),
    ]
    grpo = [Record(1, 0.5, 0.6, seconds=2.0)]
    assert [what for what, _ in summarise(grpo, 8)] == [
        "completions", "held-out accuracy", "training accuracy, last 5 steps", "seconds per step",
    ]  # fmt: skip


def test_filter_share_comes_from_verls_timing():
    entry = Entry(1, {"capo/filter_seconds": 0.1, "timing_s/update_actor": 2.0})
    assert Record.of(entry).filter_share == 0.05
    assert Record.of(Entry(1, {"timing_s/update_actor": 2.0})).filter_share is None
