# SPDX-License-Identifier: Apache-2.0
"""From YAML to tables: expansion, identity, resume, failures, Ctrl-C, packing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
import yaml

from capo_verl.config import CapoConfig
from capo_verl.experiments.study import worker
from capo_verl.experiments.study.config import RunConfig
from capo_verl.experiments.study.evidence import PAGE, RESULTS, draw, render
from capo_verl.experiments.study.frame import pack, study_frame
from capo_verl.experiments.study.grid import load_study, parse_study
from capo_verl.experiments.study.pool import run_study
from capo_verl.experiments.study.store import Store, read
from tests.experiments.study.conftest import SMALL, small

ROOT = Path(__file__).resolve().parents[3]
STUDY = {
    "study": "tiny",
    "defaults": {k: v for k, v in SMALL.items() if k != "lr"},
    "methods": {
        "grpo": {},
        "kl_budget": {"capo": {"mode": "off", "kl_budget": {}}},
        "broken": {"loss": "no_such_loss"},
    },
    "grid": {"lr": ["1e-3", 1e-2], "seed": [1, 2]},
}


def test_every_shipped_study_can_be_read():
    names, filtered = set(), set()
    for path in sorted((ROOT / "capo_verl/experiments/study/studies").glob("*.yaml")):
        study = load_study(path)
        assert study.runs and study.name == path.stem
        names.add(study.name)
        for run in study.runs:
            if run.tier != "verl":
                # What a table records of a run is enough to make it again.
                recorded = json.loads(worker.describe(run)["config"])
                assert type(run.config).from_mapping(recorded) == run.config
                knobs = run.config.capo_knobs()
                if knobs is not None:
                    CapoConfig.from_mapping(knobs)  # raises
                    filtered.add(run.method)
    assert {"main", "pretrained", "pretrained_tune", "tune", "verl"} <= names
    assert {"capo", "capo adaptive", "soft", "kl_budget"} <= filtered
    tuning = {
        run.config.seed
        for run in load_study(ROOT / "capo_verl/experiments/study/studies/tune.yaml").runs
    }
    reported = {
        run.config.seed
        for run in load_study(ROOT / "capo_verl/experiments/study/studies/main.yaml").runs
    }
    assert min(tuning) > 100 > max(reported) and len(reported) >= 5


def test_dotted_axes_reach_the_methods_that_have_them():
    study = parse_study(
        {
            "methods": {
                "grpo": {},
                "capo": {"capo": {"top_k": 4}},
                "kl": {"capo": {"kl_budget": {"delta": 1.0}}},
            },
            "grid": {"capo.kl_budget.delta": [1e-5, 1e-4], "seed": [1], "lr": [1e-3]},
        }
    )
    found = [(r.method, r.config.capo, dict(r.cell)) for r in study.runs]
    assert found == [
        ("grpo", None, {"lr": "0.001"}),
        ("capo", {"top_k": 4}, {"lr": "0.001"}),
        ("kl", {"kl_budget": {"delta": 1e-5}}, {"capo.kl_budget.delta": "1e-05", "lr": "0.001"}),
        ("kl", {"kl_budget": {"delta": 1e-4}}, {"capo.kl_budget.delta": "0.0001", "lr": "0.001"}),
    ]


def test_identity_depends_on_what_differs_from_the_defaults_alone():
    assert RunConfig(lr=1e-3).run_id == RunConfig.from_mapping({"lr": "1e-3", "steps": 200}).run_id
    assert (
        len(
            {
                RunConfig().run_id,
                RunConfig(lr=1e-3).run_id,
                RunConfig(capo={}).run_id,
                RunConfig(seed=2).run_id,
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tier": "gpu"}, "tier='gpu'"),
        ({"control": "ppo"}, "control='ppo'"),
        ({"typo": 1}, "typo is not a key of a study"),
        ({"grid": {"learning_rate": [1]}}, "learning_rate is not a key of a run"),
        ({"grid": {"lr": ["fast"]}}, "lr='fast'"),
        ({"methods": {"grpo": {"advantage": "gae"}}}, "advantage='gae'"),
        ({"methods": {"grpo": {"capo": {"preset": "best"}}}}, "capo.preset='best'"),
        ({"grids": [{"methods": ["other"], "grid": {}}]}, "other is none of the methods"),
    ],
)
def test_bad_input_is_named(tmp_path, change, message):
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **change}))
    with pytest.raises(ValueError, match=message):
        load_study(path)


@pytest.fixture(scope="module")
def results(tmp_path_factory, cache):
    """The study above, run by two workers; with one method that fails."""
    folder = tmp_path_factory.mktemp("results")
    study = parse_study(STUDY)
    outcome = run_study(study.runs, folder, jobs=2, cache=cache)
    return study, folder, outcome


def test_a_study_leaves_tables_and_failures(results):
    study, folder, outcome = results
    assert (outcome.finished, outcome.failed, outcome.skipped) == (8, 4, 0)
    runs = Store(folder).runs()
    failed = runs[runs["status"] == "failed"]
    assert len(runs) == 12 and set(failed["method"]) == {"broken"}
    assert failed["error"].str.contains("no_such_loss").all()
    finished = runs[runs["status"] == "finished"]
    assert {
        "final",
        "area",
        "collapsed",
        "commit",
        "machine",
        "config",
        "mean_kl",
        "accepted_tokens",
    } <= set(finished)
    assert json.loads(finished["config"].iloc[0])["task_knobs"] == {"digits": 3}
    curves = Store(folder).curves()
    assert (
        set(curves["run_id"]) == set(finished["run_id"])
        and curves.groupby("run_id").size().eq(3).all()
    )
    assert not list((folder / "parts").iterdir())


def test_finished_runs_are_not_run_again_and_failed_ones_are(results, cache):
    study, folder, _ = results
    before = Store(folder).runs().set_index("run_id")["started"]
    again = run_study(study.runs, folder, jobs=0, cache=cache)
    assert (again.finished, again.failed, again.skipped) == (0, 4, 8)
    kept = run_study(study.runs, folder, jobs=0, cache=cache, retry_failed=False)
    assert (kept.finished, kept.failed, kept.skipped) == (0, 0, 12)
    after = Store(folder).runs().set_index("run_id")
    finished = after.index[after["status"] == "finished"]
    assert (after.loc[finished, "started"] == before.loc[finished]).all() and len(after) == 12


def test_pack_and_page(results, tmp_path):
    study, folder, _ = results
    assert "12 runs of 1 studies" in pack([study], folder, tmp_path / "evidence")
    runs, curves = (
        pd.read_parquet(tmp_path / "evidence" / n) for n in ("runs.parquet", "curves.parquet")
    )
    assert len(runs) == 12 and set(runs["control"]) == {"grpo"}
    frame = study_frame(study, Store(folder).runs())
    assert sorted(frame["run_id"]) == sorted(runs["run_id"])
    page = render(runs, curves)
    assert page.startswith("# Studies") and "## tiny\n\n![tiny: Accuracy" in page
    assert "| kl_budget |" in page and "4 failed: 4 x ValueError: loss='no_such_loss'" in page
    made = draw(runs, curves, tmp_path)
    assert [p.name for p in made] == ["tiny-curves.png"]
    first = {p.name: p.read_bytes() for p in tmp_path.glob("tiny-*")}
    draw(runs, curves, tmp_path)
    assert len(first) == 2 and first == {p.name: p.read_bytes() for p in tmp_path.glob("tiny-*")}


def test_the_committed_page_is_what_its_data_give():
    page = (RESULTS / PAGE).read_text(encoding="utf-8")
    assert render(read(RESULTS / "runs.parquet"), read(RESULTS / "curves.parquet")) == page
    assert page.count("\n## ") > 5
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 100
    figures = re.findall(r"\]\(([\w-]+\.png)\)", page)
    assert len(figures) > 10 and not [f for f in figures if not (RESULTS / f).exists()]


def test_the_committed_figures_are_what_their_data_give(tmp_path):
    """Bit for bit where the versions that draw are those of the committed files."""
    drawn_by = re.search(r"Matplotlib v([\d.]+)", (RESULTS / "verl-curves.svg").read_text())
    if matplotlib.__version__ != drawn_by[1]:
        pytest.skip(f"the committed figures are Matplotlib {drawn_by[1]}'s")
    runs, curves = read(RESULTS / "runs.parquet"), read(RESULTS / "curves.parquet")
    runs = runs[runs["study"].isin(("verl", "long"))]
    made = draw(runs, curves, tmp_path)
    assert [p.name for p in made] == ["long-curves.png", "verl-curves.png"]
    for path in (*made, *(p.with_suffix(".svg") for p in made)):
        assert path.read_bytes() == (RESULTS / path.name).read_bytes(), path.name


def test_a_dead_worker_is_a_failed_run(tmp_path):
    """The pool loses one of two workers: that call is reported, the others are made."""
    from capo_verl.experiments.study.pool import _Pool

    ended = []
    calls = [
        (str(tmp_path / "a"), False),
        (str(tmp_path / "b"), True),
        (str(tmp_path / "c"), False),
    ]
    _Pool(2).map(
        touch_or_die,
        calls,
        lambda arguments, result, error: ended.append((arguments[0][-1], result, bool(error))),
    )
    assert sorted(ended) == [("a", "done", False), ("b", None, True), ("c", "done", False)]


def touch_or_die(path: str, die: bool) -> str:
    """What :func:`test_a_dead_worker_is_a_failed_run` runs."""
    if die:
        os._exit(9)
    Path(path).touch()
    return "done"


def test_ctrl_c_keeps_what_is_finished(tmp_path, cache):
    many = {**STUDY, "methods": {"grpo": {}}, "grid": {"lr": [1e-3], "seed": list(range(1, 41))}}
    many["defaults"] = {**many["defaults"], "base_seed": 1}
    path = tmp_path / "many.yaml"
    path.write_text(yaml.safe_dump(many))
    command = [
        sys.executable, "-m", "capo_verl.experiments.study", "run", str(path), "--jobs", "2",
        "--results", str(tmp_path / "r"), "--cache", str(cache),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 120
    while (
        not list((tmp_path / "r").glob("parts/*.json"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted; the same command goes on" in out
    runs = Store(tmp_path / "r").runs()
    assert 1 <= len(runs) < 40 and (runs["status"] == "finished").all()


def test_a_failure_in_training_is_recorded(tmp_path, cache, monkeypatch):
    from capo_verl.experiments.study import loop
    from capo_verl.experiments.study.grid import PlannedRun

    monkeypatch.setattr(loop, "evaluate", lambda *_: 1 / 0)
    row = worker.execute(PlannedRun("s", "tiny", "grpo", small()), tmp_path, cache)
    assert row["status"] == "failed" and row["error"].startswith("ZeroDivisionError")
    assert Store(tmp_path).runs()["status"].tolist() == ["failed"]
