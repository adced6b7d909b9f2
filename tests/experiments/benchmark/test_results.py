# SPDX-License-Identifier: Apache-2.0
"""What follows from the measured numbers, and their way through JSON and Markdown."""

from __future__ import annotations

from dataclasses import replace

import pytest

from capo_verl.commands.measure.memory import Usage
from capo_verl.commands.measure.results import Report, Result, Traffic, traffic
from capo_verl.commands.measure.targets import judge_targets
from capo_verl.experiments.benchmark.markdown import (
    BEGIN,
    COLUMNS,
    END,
    cells,
    markdown,
    update_docs,
)

MIB = 1 << 20


def report(processor: str = "A CPU") -> Report:
    def result(
        contender: str,
        tokens: int,
        evaluate: float,
        later: dict[str, list[float]],
        peak: int,
        held: int,
    ):
        memory = {"evaluate": Usage(peak * MIB, held * MIB)} | {
            stage: Usage((held + 5) * MIB, held * MIB if i + 1 < len(later) else 0)
            for i, stage in enumerate(later)
        }
        return Result(
            contender, tokens, {"evaluate": [evaluate * 3, evaluate, evaluate / 2], **later}, memory
        )

    return Report(
        title="cpu-small, TP 1",
        environment={
            "processor": processor,
            "device": "cpu",
            "clock": "wall clock",
            "threads": 1,
            "cores": 2,
            "torch": "2.13.0",
            "allocator": "default",
            "commit": "abc",
        },
        sizes={"preset": "cpu-small", "tp": 1, "top_k": 50},
        copy_bytes_per_second=10e9,
        agreement={"torch against naive: exp_avg": 1e-7},
        traffic=[Traffic(n, 10, n * 1000, n * 500, n * 200) for n in (1024, 2048, 65536)],
        results=[
            result("naive", 1024, 1.0, {"accumulate": [0.1] * 3, "update": [0.2] * 3}, 700, 100),
            result("naive", 2048, 2.0, {"accumulate": [0.1, 0.5, 0.3], "update": [0.4, 0.1, 0.2]},
                1400, 200),
            Result("naive", 65536, skipped="needs 47.0 GB, 9.0 GB free"),
            result("naive_reused", 1024, 0.5, {"accumulate": [0.1] * 3, "update": [0.1] * 3}, 400,
                100),
            result("naive_reused", 2048, 1.2, {"accumulate": [0.1] * 3, "update": [0.1] * 3}, 800,
                200),
            result("naive_reused", 65536, 38.4, {"accumulate": [3.0] * 3, "update": [1.0] * 3},
                25600, 6400),
            result("torch", 1024, 0.25, {"step": [0.05] * 3}, 60, 20),
            result("torch", 2048, 0.4, {"step": [0.05] * 3}, 70, 30),
            result("torch", 65536, 12.8, {"step": [0.05] * 3}, 90, 50),
            *(Result("triton", n, skipped="needs a GPU") for n in (1024, 2048, 65536)),
        ],
    )  # fmt: skip


def test_medians_ratios_memory_and_bandwidth():
    r = report()
    naive, torch_ = r.result("naive", 2048), r.result("torch", 2048)
    assert naive.evaluate_seconds == 2.0
    assert naive.update_seconds == pytest.approx(
        0.5
    )  # median of 0.5, 0.6, 0.5: of the sums, not the sum of medians
    assert (torch_.extra_bytes, torch_.held_bytes) == (70 * MIB, 30 * MIB)
    assert torch_.evaluate_scratch_bytes == 40 * MIB  # 70 - 30
    assert torch_.update_scratch_bytes == 5 * MIB  # 35 - 30
    assert r.speedup(torch_) == pytest.approx(5.0) and r.speedup(r.result("torch", 65536)) is None
    assert r.speedup(torch_, over="naive_reused") == pytest.approx(3.0)
    assert r.speedup(r.result("torch", 65536), over="naive_reused") == pytest.approx(3.0)
    assert r.memory_ratio(torch_) == pytest.approx(0.05)
    assert r.bandwidth(torch_) == pytest.approx(
        {
            "evaluate": 2048 * 1000 / 0.4,
            "evaluate_rows_once": 2048 * 500 / 0.4,
            "update": 2048 * 200 / 0.05,
        }
    )


def test_stages_of_several_batches():
    seconds = {
        "evaluate": [1.0, 2.0, 9.0], "accumulate": [0.1, 0.2, 0.3], "evaluate 2": [5.0, 3.0, 1.0],
        "accumulate 2": [0.3, 0.1, 0.4], "update": [0.2, 0.2, 0.2],
    }  # fmt: skip
    usage = {
        "evaluate": (700, 100),
        "accumulate": (230, 30),
        "evaluate 2": (430, 80),
        "accumulate 2": (95, 31),
    }
    memory = {stage: Usage(*x) for stage, x in usage.items()} | {"update": Usage(38, 1)}
    result = Result("naive", 40_000, seconds, memory)
    assert result.evaluate_seconds == pytest.approx(6.0)  # of 6, 5, 10
    assert result.update_seconds == pytest.approx(0.6)  # of 0.6, 0.5, 0.9
    assert (result.extra_bytes, result.held_bytes) == (700, 100)
    assert result.evaluate_scratch_bytes == 600  # 700 - 100; 430 - 80
    assert result.update_scratch_bytes == 130  # 230 - 100; 95 - 80; 38 - 31


def test_growth_exponents():
    growth = report().growth("torch", "evaluate")
    assert growth.largest == pytest.approx(1.0)  # 0.4 s -> 12.8 s, both times 32
    assert 0.9 < growth.overall < 1.0  # 0.25 s -> 0.4 s is less than twice
    assert report().growth("torch", "update").overall == pytest.approx(0.0, abs=1e-12)
    assert report().growth("triton", "evaluate") is None


def test_bytes_that_must_move():
    t = traffic(
        tokens=100,
        distinct_rows=30,
        rows=1000,
        top_k=5,
        hidden_size=16,
        model_bytes=2,
        moment_bytes=4,
    )
    assert t.evaluate == 100 * 1000 * 4 + 100 * 16 * 2 + 100 * 5 * 16 * 4 * 2
    assert t.evaluate_rows_once == 100 * 1000 * 4 + 100 * 16 * 2 + 30 * 16 * 4 * 2
    assert t.update == 100 * 5 * 16 * 2 + 30 * 16 * 4 * 2 * 2


def test_json_round_trip(tmp_path):
    path = tmp_path / "report.json"
    report().save(path)
    assert Report.load(path) == report()
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="not a benchmark report of format 2"):
        Report.load(path)


def test_table_and_targets():
    rows = cells(report())
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert dict(zip(COLUMNS, rows[2], strict=True)).items() >= {
        "tokens": "1,024", "contender": "(b) chunked torch", "evaluate ms": "250",
        "update ms": "50.0",
        "times (a)'s speed": "4.00", "times (a')'s speed": "2.00", "extra MiB": "60.0",
        "of (a)'s": "0.086",
        "held MiB": "20.0", "scratch MiB": "40.0", "update scratch MiB": "5.00",
    }.items()  # fmt: skip
    assert rows[-2][1] == "(b) chunked torch" and rows[-2][4:6] == [
        "—",
        "3.00",
    ]  # (a) does not fit, (a') does
    assert ["65,536", "(a) as published: needs 47.0 GB, 9.0 GB free"] in [row[:2] for row in rows]
    assert [row[:2] for row in rows if "GPU" in row[1]] == [["all", "(c) fused: needs a GPU"]]
    assert [(v.measured, v.met) for v in judge_targets(report())] == [
        ("5.00", True),
        ("0.050", True),
        ("1.00", True),
    ]
    slow = replace(report(), copy_bytes_per_second=1.0, sizes={**report().sizes, "tp": 4})
    assert judge_targets(slow) == []  # the targets are of TP 1


def test_other_settings_of_the_allocator_are_named():
    r = report()
    assert "MALLOC" not in markdown(r)
    changed = replace(r, environment={**r.environment, "allocator": "MALLOC_MMAP_MAX_=0"})
    assert "1 of 2 cores, MALLOC_MMAP_MAX_=0, torch 2.13.0" in markdown(changed)


def test_a_missed_target_says_so():
    results = [
        replace(r, seconds={**r.seconds, "evaluate": [1.0] * 3}) if r.contender == "torch" else r
        for r in report().results
    ]
    assert [v.met for v in judge_targets(replace(report(), results=results))] == [False, True, True]
    assert "| 2.00 | **no** |" in markdown(replace(report(), results=results))


def test_the_page_keeps_the_runs_of_other_machines(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text(f"# Title\n\n{BEGIN}\n{END}\n\nAfter.\n")
    update_docs(report("One"), page)
    update_docs(report("Two"), page)
    faster = replace(report("One"), copy_bytes_per_second=77e9)
    update_docs(faster, page)
    text = page.read_text()
    assert text.count("### cpu-small, TP 1 on One") == text.count("### cpu-small, TP 1 on Two") == 1
    assert text.count("77.0 GB/s") == text.count("10.0 GB/s") == 1
    assert text.startswith("# Title\n") and text.endswith(f"{END}\n\nAfter.\n")
    update_docs(faster, page)
    assert page.read_text() == text


def test_a_page_without_markers(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("# Title\n")
    with pytest.raises(ValueError, match="expected the lines <!-- benchmark: begin -->"):
        update_docs(report(), page)
