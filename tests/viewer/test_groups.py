# SPDX-License-Identifier: Apache-2.0
"""Which runs are averaged, and the band against a direct computation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from capo_verl.viewer.config import varying_keys
from capo_verl.viewer.derived import COMPLETIONS, REWARD
from capo_verl.viewer.groups import band, group_runs
from capo_verl.viewer.panels import PANELS, choose_axis
from capo_verl.viewer.series import Run, Series

REWARDS = next(panel for panel in PANELS if panel.key == "reward")
REJECTION = next(panel for panel in PANELS if panel.key == "rejection")


def run(name: str, config: dict | None = None, **series: Series) -> Run:
    return Run(name, Path(name), {REWARD: Series(), **series}, config)


def labels(runs: list[Run], *over: str) -> list[tuple[str, int]]:
    return [(group.label, len(group.runs)) for group in group_runs(runs, over or ("seed",))]


def test_runs_that_differ_in_their_seed_only_are_one_group():
    def of(name: str, lr: float, seed: int) -> Run:
        seeds = {"data.seed": seed, "actor.data_loader_seed": seed}
        names = {"trainer.experiment_name": name, "x.output_dir": f"/{name}"}
        return run(name, {"lr": lr, **seeds, **names})

    runs = [of("a", 1e-3, 1), of("b", 1e-3, 2), of("c", 2e-3, 1)]
    assert labels(runs) == [("lr=0.001 (2 runs)", 2), ("c", 1)]
    assert labels(runs, "seed", "lr") == [("a (3 runs)", 3)]
    assert labels(runs, "experiment") == [("a", 1), ("b", 1), ("c", 1)]
    assert varying_keys(r.config for r in runs) == ["actor.data_loader_seed", "data.seed", "lr"]


def test_without_configurations_the_names_decide():
    names = ["capo-seed1", "capo_seed2", "grpo seed=1", "grpo seed=2", "proceed3"]
    assert labels([run(name) for name in names]) == [
        ("capo (2 runs)", 2),
        ("grpo (2 runs)", 2),
        ("proceed3", 1),
    ]


def test_band_is_mean_and_range_at_each_step():
    values = np.array([[0.1, 0.2, 0.6], [0.3, 0.1, 0.2]])
    series = [Series([1, 2, 3], list(v)) for v in values]
    series[1] = Series([1, 2], series[1].values[:2])  # the second run died
    runs = [
        run("a-seed1", **{REWARD: series[0], COMPLETIONS: Series([1, 2, 3], [10.0, 20.0, 30.0])}),
        run("a-seed2", **{REWARD: series[1], COMPLETIONS: Series([1, 2], [14.0, 24.0])}),
    ]
    (group,) = group_runs(runs)
    found = band(REWARDS, REWARDS.curves[0], group, "completions")
    assert found.x == [12, 22, 30]
    assert found.mean == pytest.approx([0.2, 0.15, 0.6])
    assert found.low == [0.1, 0.1, 0.6]
    assert found.high == [0.3, 0.2, 0.6]


def test_panels_bring_values_into_their_unit():
    logged = run("a", **{"capo/rejection_rate": Series([1], [0.015])})
    assert REJECTION.series(logged, REJECTION.curves[0]).values == [1.5]  # per cent
    shifts = next(panel for panel in PANELS if panel.key == "policy_shift")
    logged = run("a", **{"capo/policy_shift_p50": Series([1, 2], [0.0, 1e-6])})
    assert shifts.series(logged, shifts.curves[0]).steps == [2]  # a logarithmic axis has no 0


def test_the_x_axis_is_what_all_runs_have():
    known, unknown = (
        run("a", **{COMPLETIONS: Series([1], [32.0])}),
        run("b", **{REWARD: Series([1], [0.1])}),
    )
    assert choose_axis([known]) == "completions"
    assert choose_axis([known, unknown]) == "steps"
    with pytest.raises(ValueError, match="--x completions: unknown for b .*use --x steps"):
        choose_axis([known, unknown], "completions")
