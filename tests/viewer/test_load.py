# SPDX-License-Identifier: Apache-2.0
"""The same numbers from every kind of log, and one clear sentence for what is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from capo_verl.viewer.choose import choose
from capo_verl.viewer.derived import ACCEPTED, ACCURACY, COMPLETIONS, REWARD
from capo_verl.viewer.load import load_runs
from capo_verl.viewer.series import Run
from tests.viewer.logs import (
    capo_rows,
    write_config,
    write_file_log,
    write_runs,
)

RECORDED = Path(__file__).parents[1] / "cpu" / "quickstart" / "data" / "grpo.jsonl"


def at(run: Run, metric: str) -> dict[int, float]:
    return run.series[metric].at()


def as_logged(run: Run) -> dict[str, dict[int, float]]:
    return {name: series.at() for name, series in run.series.items() if "/" in name}


def expected() -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for step, data in capo_rows():
        for key, value in data.items():
            found.setdefault(key, {})[step] = value
    return found


def test_verls_file_log(tmp_path):
    (run,) = load_runs([write_file_log(tmp_path / "capo" / "metrics.jsonl", capo_rows())])
    assert (run.name, run.config, run.samples) == ("capo", None, [])
    assert as_logged(run) == expected()
    assert at(run, ACCURACY) == {0: 0.25, 5: 0.4, 10: 0.5}
    assert at(run, REWARD)[10] == pytest.approx(0.4)
    # 640 tokens a step in completions of 20; a quarter of each completion's 8 response tokens is
    # rejected.
    assert at(run, COMPLETIONS) == {step: 32.0 * step for step in range(11)}
    assert at(run, ACCEPTED)[10] == pytest.approx(10 * 32 * 8 * 0.75)


def test_a_run_recorded_from_verl():
    (run,) = load_runs([RECORDED])
    assert run.name == "grpo"
    assert at(run, ACCURACY) == {0: 0.35546875, 5: 0.41796875}
    assert at(run, REWARD)[3] == 0.3828125
    assert COMPLETIONS not in run.series  # neither configuration nor lengths of prompts


def test_tensorboard(tmp_path):
    writer_module = pytest.importorskip("torch.utils.tensorboard")
    writer = writer_module.SummaryWriter(str(tmp_path / "project" / "experiment"))
    for step, data in capo_rows():
        for key, value in data.items():
            writer.add_scalar(key, value, step)
    writer.close()
    (run,) = load_runs([tmp_path])
    assert run.name == "experiment"
    found = as_logged(run)
    assert found.keys() == expected().keys()
    for key, values in expected().items():
        assert found[key] == pytest.approx(values, rel=1e-6)  # stored in float32


WANDB = """
import json, sys
import wandb
config = {"data": {"seed": 7, "train_batch_size": 4}, "actor_rollout_ref": {"rollout": {"n": 8}}}
run = wandb.init(project="p", name="my run", dir=sys.argv[1], config=config)
for step, data in json.loads(sys.argv[2]):
    run.log({**data, "long": 1.0, "text": "x" * 40000, "nan": float("nan")}, step=step)
run.finish()
"""


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb")
    environment = {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path), "WANDB_CONSOLE": "off", "WANDB_X_DISABLE_STATS": "true",
    }  # fmt: skip
    subprocess.run(
        [sys.executable, "-c", WANDB, str(tmp_path), json.dumps(capo_rows())],
        env=environment,
        check=True,
        timeout=300,
    )
    (run,) = load_runs([tmp_path])
    assert run.name == "my run"
    assert as_logged(run) == expected()  # records of 40,000 bytes: each is spread over two blocks
    assert run.config == {
        "data.seed": 7,
        "data.train_batch_size": 4,
        "actor_rollout_ref.rollout.n": 8,
    }
    assert at(run, COMPLETIONS)[10] == 320


def test_study_tables(tmp_path):
    pd = pytest.importorskip("pandas")
    about = {"study": "main", "method": "grpo", "task": "sort8", "lr": 1e-3}
    runs = [
        {"run_id": "a", "status": "finished", "seed": 1, "final": 0.5, **about},
        {"run_id": "b", "status": "failed", "seed": 2, "final": None, **about},
    ]
    curve = [
        {
            "run_id": "a",
            "step": s,
            "completions": 32 * s,
            "accepted_tokens": 200 * s,
            "accuracy": 0.1 * s,
            "kl": 1e-4,
        }
        for s in range(4)
    ]
    curve[0]["kl"] = None
    pd.DataFrame(runs).to_parquet(tmp_path / "runs.parquet")
    pd.DataFrame(curve).to_parquet(tmp_path / "curves.parquet")
    pd.DataFrame([{"x": 1}]).to_parquet(tmp_path / "another.parquet")  # of something else
    for path in (tmp_path, tmp_path / "runs.parquet"):
        (run,) = load_runs([path])
        assert run.name == "grpo sort8 lr=0.001 seed=1"
        assert at(run, ACCURACY) == {s: 0.1 * s for s in range(4)}
        assert at(run, "capo/kl_mean") == {1: 1e-4, 2: 1e-4, 3: 1e-4}
        assert (at(run, COMPLETIONS)[3], at(run, ACCEPTED)[3]) == (96, 600)
        assert run.config == {**about, "seed": 1}


def test_a_folder_of_runs_with_configurations_and_samples(tmp_path):
    runs = load_runs([write_runs(tmp_path)])
    assert [run.name for run in runs] == ["capo-seed1", "capo-seed2", "grpo"]
    assert [run.config["data.seed"] for run in runs] == [1, 2, 1]
    assert [len(run.samples) for run in runs] == [4, 0, 0]
    assert at(runs[0], COMPLETIONS)[10] == 4 * 8 * 10
    assert at(runs[0], "capo/policy_threshold") == dict.fromkeys(
        range(1, 11), 1e-4
    )  # from the configuration


def test_further_starts_of_a_run_continue_it(tmp_path):
    write_file_log(tmp_path / "metrics.jsonl", [(1, {"m": 1.0}), (2, {"m": 2.0}), (3, {"m": 3.0})])
    write_file_log(tmp_path / "metrics.2.jsonl", [(3, {"m": 30.0}), (4, {"m": 40.0})])
    write_file_log(tmp_path / "metrics.10.jsonl", [(4, {"m": 400.0})])
    (run,) = load_runs([tmp_path])
    assert at(run, "m") == {1: 1.0, 2: 2.0, 3: 30.0, 4: 400.0}


@pytest.mark.parametrize("knob", [("mode", "track"), ("weighting", "soft")])
def test_where_no_token_leaves_the_loss_all_are_counted(tmp_path, knob):
    write_file_log(tmp_path / "metrics.jsonl", capo_rows())
    write_config(tmp_path, **{f"actor_rollout_ref__actor__policy_loss__capo__{knob[0]}": knob[1]})
    (run,) = load_runs([tmp_path])
    assert at(run, ACCEPTED)[10] == 10 * 32 * 8


def test_once_the_guard_has_stopped_the_filter_all_tokens_are_counted(tmp_path):
    rows = [(step, {**data, "capo/filter_stopped": float(step > 4)}) for step, data in capo_rows()]
    write_file_log(tmp_path / "metrics.jsonl", rows)
    write_config(tmp_path, actor_rollout_ref__actor__policy_loss__capo__weighting="hard")
    (run,) = load_runs([tmp_path])
    assert at(run, ACCEPTED)[10] == 4 * 32 * 8 * 0.75 + 6 * 32 * 8


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for parent in ("first", "second"):
        write_file_log(tmp_path / parent / "run" / "metrics.jsonl", capo_rows())
    assert [run.name for run in load_runs([tmp_path])] == ["first/run", "second/run"]
    twice = [tmp_path / "first", tmp_path / "first"]
    assert [run.name for run in load_runs(twice)] == ["first/run", "first/run (2)"]


def test_a_line_still_being_written_is_left_out(tmp_path):
    path = write_file_log(tmp_path / "metrics.jsonl", capo_rows(3))
    with path.open("a") as file:
        file.write('{"step": 4, "da')
    (run,) = load_runs([path])
    assert max(run.series["actor/entropy"].steps) == 3


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: t / "nowhere", "nowhere: no such file or folder; give verl's file logger"),
        (lambda t: t, "no log of a run in this folder; give"),
        (
            lambda t: written(t / "metrics.jsonl", b""),
            "the file is empty; nothing has been logged yet",
        ),
        (lambda t: written(t / "metrics.jsonl", b"hello\n"), "not a log of a run; give"),
        (lambda t: written(t / "x.wandb", b"hello there"), "not a file of wandb"),
        (
            lambda t: written(t / "runs.parquet", b"PAR1"),
            "the other table, curves.parquet, is not beside it",
        ),
        (
            lambda t: write_file_log(t / "m.jsonl", [(0, {})]),
            "no metrics in this log; the run has not finished a step yet",
        ),
    ],
)
def test_what_is_no_run_is_said_in_one_sentence(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        load_runs([make(tmp_path)])


def test_a_parquet_file_that_is_none(tmp_path):
    pytest.importorskip("pandas")
    for name in ("runs.parquet", "curves.parquet"):
        written(tmp_path / name, b"hello")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        load_runs([tmp_path])


def test_choosing_runs_by_their_configuration(tmp_path):
    runs = load_runs([write_runs(tmp_path)])
    assert [run.name for run in choose(runs, ["seed=1"])] == ["capo-seed1", "grpo"]
    assert [run.name for run in choose(runs, ["seed=1", "seed=2", "policy_shift_max=0.0001"])] == [
        "capo-seed1",
        "capo-seed2",
    ]
    with pytest.raises(ValueError, match="--where seed=3: no run has it; values there are: 1, 2"):
        choose(runs, ["seed=3"])
    with pytest.raises(ValueError, match="--where seed: write KEY=VALUE"):
        choose(runs, ["seed"])
