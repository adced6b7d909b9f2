# SPDX-License-Identifier: Apache-2.0
"""The whole script, small; and what it says to wrong arguments."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from capo_verl.commands.measure import agreement, runner
from capo_verl.commands.measure.batch import make_batch
from capo_verl.commands.measure.contenders import TORCH, accept_all
from capo_verl.commands.measure.results import Report
from capo_verl.commands.measure.workload import Workload
from capo_verl.experiments.benchmark.markdown import COLUMNS

SCRIPT = Path(__file__).parents[3] / "capo_verl/experiments/benchmark/__main__.py"
SMALL = (
    "--vocab-size",
    "500",
    "--hidden-size",
    "16",
    "--tokens",
    "64",
    "128",
    "--repeats",
    "2",
    "--device",
    "cpu",
)


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, str(SCRIPT), *arguments),
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_small_run_writes_json_markdown_figure_and_profile(tmp_path):
    done = script(*SMALL, "--output", str(tmp_path), "--profile")
    assert done.returncode == 0, done.stderr
    stem = "V500-H16-tp1-cpu"
    report = Report.load(tmp_path / f"{stem}.json")
    assert [(r.contender, r.tokens) for r in report.results if not r.skipped] == [
        (contender, n) for n in (64, 128) for contender in ("naive", "naive_reused", "torch")
    ]  # fmt: skip
    for row in json.loads((tmp_path / f"{stem}.json").read_text())["derived"]:
        numbers = {k: v for k, v in row.items() if k != "contender"}
        assert all(math.isfinite(v) and v > 0 for v in numbers.values()), numbers
    assert all(len(s) == 2 for r in report.results for s in r.seconds.values())
    assert report.copy_bytes_per_second > 1e8
    assert {k.rpartition(" ")[2] for k in report.agreement} >= {
        "objective_shift",
        "policy_shift",
        "exp_avg",
        "exp_avg_sq",
    }
    table = (tmp_path / f"{stem}.md").read_text()
    assert f"| {' | '.join(COLUMNS)} |" in table and "| 128 | (b) chunked torch |" in table
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert "support.find_support" in (tmp_path / f"{stem}-profile-torch.txt").read_text()
    assert "(b) chunked torch" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "gpt-9"), "argument --preset: invalid choice: 'gpt-9' .*qwen2.5-32b"),
        (("--tokens", "0"), "argument --tokens: expected an integer >= 1, got '0'"),
        (("--tp", "1.5"), "argument --tp: expected an integer >= 1, got '1.5'"),
        (
            ("--vocab-size", "64", "--tp", "2"),
            "--top-k 50 exceeds the 32 vocabulary rows of one of 2 tensor-parallel ranks",
        ),
        (("--tokens", "1000000000"), "--tokens 1000000000: inputs: needs .* GB, .* GB free"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path, capsys):
    namespace = runpy.run_path(str(SCRIPT))
    try:
        code = namespace["main"]([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    except SystemExit as stop:
        code = stop.code
    assert code
    assert re.fullmatch(f"capo_verl.experiments.benchmark: {message}.*\n", capsys.readouterr().err)


def test_contenders_that_differ_are_not_timed(monkeypatch):
    workload = Workload("tiny", 500, 16, 1, 20, (64,), "cpu")

    def twice_the_learning_rate(batch):
        return (
            batch.hidden_states,
            batch.logits,
            batch.actions,
            1.001 * batch.advantages,
            batch.response_mask,
            3e-6,
        )

    wrong = TORCH._replace(build=_built_with(twice_the_learning_rate))
    monkeypatch.setattr(agreement, "TORCH", wrong)
    with pytest.raises(agreement.DisagreementError, match="torch against naive, float32"):
        runner.run(workload, repeats=1, say=lambda text: None)


def _built_with(arguments):
    def build(workload, config, dtype):
        filter_ = TORCH.build(workload, config, dtype)
        filter_.stages = lambda batch: {
            "evaluate": lambda: filter_.evaluate(*arguments(batch)),
            "step": filter_.step,
        }
        return filter_

    return build


def test_the_naive_formulation_is_left_out_where_it_would_take_too_long(monkeypatch):
    workload = Workload("tiny", 500, 16, 1, 20, (64, 128), "cpu")
    monkeypatch.setattr(runner, "NAIVE_SECONDS", 1e-9)
    report = runner.run(workload, repeats=1, say=lambda text: None)
    skipped = {
        (r.contender, r.tokens): r.skipped
        for r in report.results
        if r.contender != "triton" and r.skipped
    }
    assert skipped == dict.fromkeys([("naive", 128), ("naive_reused", 128)], "would take 0 s")
    assert report.result("torch", 128) and report.speedup(report.result("torch", 128)) is None


def test_batches_are_the_same_for_every_size_and_have_the_stated_support():
    workload = Workload("tiny", 3000, 8, 1, 20, (256,), "cpu")
    batch, again = make_batch(workload, 256, seed=5), make_batch(workload, 256, seed=5)
    assert torch.equal(batch.logits, again.logits) and torch.equal(batch.actions, again.actions)
    assert torch.equal(batch.support.long(), batch.logits.topk(20).indices)
    assert batch.part(slice(10)).logits.data_ptr() == batch.logits.data_ptr()
    assert (
        batch.distinct_rows
        == len(set(batch.support.flatten().tolist()))
        < 0.5 * batch.support.numel()
    )
    inside = (batch.support == batch.actions[:, None]).any(-1).float().mean()
    assert 0.9 < inside < 1.0
    mass = batch.logits.softmax(-1).gather(1, batch.support.long()).sum(-1).mean()
    assert 0.75 < mass < 0.95  # the 20 largest of 3,000


def test_a_tensor_parallel_rank_has_its_share_of_the_rows():
    workload = replace(Workload("tiny", 3000, 8, 1, 20, (64,), "cpu"), tp=8)
    assert workload.rows == 375
    assert TORCH.build(workload, accept_all(workload), torch.float32).state_dict()[
        "exp_avg"
    ].shape == (375, 8)
    assert int(make_batch(workload, 64, seed=0).support.max()) < 375
