# SPDX-License-Identifier: Apache-2.0
"""Measures and comparisons on curves made by hand."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from capo_verl.experiments.study import compare
from capo_verl.experiments.study.frame import ordered
from capo_verl.experiments.study.measures import area, first_reached, summarise
from capo_verl.experiments.study.tables import frame_tables


def curve(*accuracies: float, **columns: float):
    return [
        {
            "step": 10 * i,
            "completions": 320 * i,
            "accepted_tokens": 2560 * i,
            "accuracy": a,
            **columns,
        }
        for i, a in enumerate(accuracies)
    ]


def test_summary_of_a_curve():
    rows = curve(0.4, 0.5, 0.2, 0.6, 0.7, 0.8)
    for i, row in enumerate(rows[1:]):
        row.update(kl=1e-4 * (i + 1), kl_max=1e-3 * (i + 1), entropy=0.1 * i)
    found = summarise(rows)
    assert found["base"] == 0.4 and found["lowest"] == 0.2 and found["highest"] == 0.8
    assert found["final"] == pytest.approx(0.7) and found["collapsed"] is False
    assert found["mean_kl"] == pytest.approx(3e-4) and found["kl_max"] == pytest.approx(5e-3)
    assert found["final_entropy"] == pytest.approx(0.4)
    assert found["area"] == pytest.approx((0.45 + 0.35 + 0.4 + 0.65 + 0.75) / 5)
    assert found["completions"] == 1600


@pytest.mark.parametrize(("last", "collapsed"), [(0.19, True), (0.21, False)])
def test_collapse_is_half_of_the_base(last, collapsed):
    assert summarise(curve(0.4, 0.9, last, last, last))["collapsed"] is collapsed


def test_area_over_uneven_steps():
    rows = curve(0.0, 1.0)
    rows.append({"step": 40, "completions": 1280, "accuracy": 0.0})
    assert area(rows) == pytest.approx((320 * 0.5 + 960 * 0.5) / 1280)


def test_first_reached_interpolates():
    rows = curve(0.4, 0.5, 0.7, 0.6)
    assert first_reached(rows, 0.6) == pytest.approx(320 + 160)
    assert first_reached(rows, 0.6, "accepted_tokens") == pytest.approx(2560 * 1.5)
    assert first_reached(rows, 0.3) == 0
    assert first_reached(rows, 0.71) is None


def test_verdict_needs_both_intervals():
    assert compare.verdict([0.10, 0.12, 0.11, 0.09, 0.10]) == "better"
    assert compare.verdict([-0.10, -0.12, -0.11, -0.09, -0.10]) == "worse"
    assert compare.verdict([0.1, -0.1, 0.05, -0.06, 0.0]) == "same"
    assert compare.verdict([0.3, 0.3]) == "same"  # two seeds decide nothing
    # The bootstrap of values of one sign always excludes 0; Student's interval, 0.21 +- 0.27, does
    # not.
    values = [0.01, 0.02, 0.03, 0.45, 0.54]
    assert compare.interval(values)[1] > 0 and compare.verdict(values) == "same"


def frame(rows) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["method", "lr", "seed", "final"])
    table["cell"] = [json.dumps({"task": "sort8", "lr": f"{lr:g}"}) for lr in table["lr"]]
    table["status"] = ["failed" if math.isnan(f) else "finished" for f in table["final"]]
    table["run_id"] = [f"r{i}" for i in range(len(table))]
    return table.assign(
        study="s", control="grpo",
        error=["" if s == "finished" else "RuntimeError: broke\ntrace" for s in table["status"]],
        collapsed=False, lowest=0.1, mean_kl=1e-4, mean_rejection=0.0, mean_scale=1.0,
        final_entropy=0.1, seconds=5.0,
    )  # fmt: skip


RATES = (1e-4, 1e-3, 1e-2)
CONTROL = {1e-4: 0.8, 1e-3: 0.6, 1e-2: 0.0}
METHOD = {1e-4: 0.8, 1e-3: 0.7, 1e-2: 0.6}


def table() -> pd.DataFrame:
    rows = []
    for lr in RATES:
        for seed in (1, 2, 3):
            noise = 0.01 * seed
            rows.append(("grpo", lr, seed, CONTROL[lr] + noise))
            rows.append(("budget", lr, seed, METHOD[lr] + noise + 0.001 * seed))
    return frame(rows)


def test_differences_are_paired_by_seed():
    found = {json.loads(d.cell)["lr"]: d for d in compare.differences(table())}
    assert found["0.001"].estimate.mean == pytest.approx(0.102) and found["0.001"].seeds == 3
    assert (
        found["0.001"].verdict == found["0.01"].verdict == "better"
    )  # although the seeds alone differ by 0.02
    assert found["0.001"].estimate.low == pytest.approx(0.101, abs=1e-6)


def test_a_failed_run_counts_as_accuracy_zero():
    rows = table()
    worst = (rows["method"] == "budget") & (rows["lr"] == 1e-4) & (rows["seed"] == 1)
    rows.loc[worst, ["final", "status", "error"]] = [float("nan"), "failed", "RuntimeError: broke"]
    found = {json.loads(d.cell)["lr"]: d for d in compare.differences(rows)}
    assert found["0.0001"].estimate.mean == pytest.approx((-0.81 + 0.002 + 0.003) / 3)
    assert "1 failed: 1 x RuntimeError: broke" in frame_tables(
        rows, pd.DataFrame({"run_id": [], "step": []})
    )


def test_area_between_methods_over_the_learning_rate():
    found = compare.over_rates(table()).iloc[0]
    # Differences 0, 0.1, 0.6 at equal distances in log(lr), plus 0.001 seed: trapezoid (0.05 +
    # 0.35) / 2.
    assert found["mean"] == pytest.approx(0.2 + 0.002) and found["verdict"] == "better"


def test_tuned_control_and_efficiency():
    rows = table()
    assert compare.tuned_control(rows) == {'{"task": "sort8"}': (1e-4, pytest.approx(0.82))}
    curves = []
    for run, method in zip(rows["run_id"], rows["method"], strict=True):
        up = (0.4, 0.6, 0.9) if method == "budget" else (0.4, 0.5, 0.6)
        curves += [{"run_id": run, **row} for row in curve(*up)]
    reached = compare.efficiency(rows, pd.DataFrame(curves))
    target = 0.95 * 0.82
    assert reached["target"].tolist() == pytest.approx([target] * len(reached))
    budget = reached[reached["method"] == "budget"]
    assert budget["completions"].tolist() == pytest.approx([320 * (1 + (target - 0.6) / 0.3)] * 9)
    assert reached[reached["method"] == "grpo"]["completions"].isna().all()


def test_tables_name_the_control_and_mark_verdicts():
    text = frame_tables(table(), pd.DataFrame({"run_id": [], "step": []}))
    line = next(line for line in text.splitlines() if line.startswith("| budget | .8"))
    assert ".702" not in line and ".722 [.7" in line and line.count("▲") >= 2
    assert "All cells, control `grpo`" in text
    # At 1e-4 the differences are 0.001, 0.002 and 0.003: Student's interval holds 0.
    assert "| budget | 2 / 1 / 0 | +0.002 | +0.202 |" in text


def test_rows_begin_with_the_control_and_rise_with_the_knob():
    cells = [
        '{"capo.top_k": "8", "lr": "1"}',
        '{"capo.top_k": "16", "lr": "1"}',
        '{"lr": "1"}',
        '{"capo.top_k": "2", "lr": "1"}',
    ]
    frame = pd.DataFrame(
        {"method": ["capo", "capo", "grpo", "capo"], "control": "grpo", "cell": cells}
    )
    assert list(ordered(frame).index) == [2, 3, 0, 1]


def test_cells_are_ordered_by_the_numbers_they_begin_with():
    cells = [
        json.dumps({"name": name, "lr": lr})
        for name in ("128 of", "16 of", "32 in 4")
        for lr in ("1e-3", "0.0001")
    ]
    frame = pd.DataFrame({"method": "grpo", "control": "grpo", "cell": cells})
    assert list(ordered(frame).index) == [3, 2, 5, 4, 1, 0]
