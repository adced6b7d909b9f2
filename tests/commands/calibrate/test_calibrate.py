# SPDX-License-Identifier: Apache-2.0
"""``capo-verl calibrate`` on a tiny random Qwen2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("verl")

from capo_verl.commands.calibrate import calibration
from capo_verl.commands.calibrate.propose import DELTA
from capo_verl.commands.calibrate.sample import by_data_source, load_reward
from capo_verl.commands.main import main
from capo_verl.data.evaluation.problems import Problem
from tests.commands.calibrate.naive import NaiveRun
from tests.helpers.tiny_inputs import make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def arguments(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        "calibrate", "--model", str(inputs / "model"), "--data", str(inputs / "train.parquet"),
        "--output", str(output),
        "--reward", f"{inputs / 'reward.py'}:compute_score", "--batch", "8", "-n", "4",
        "--max-response-length", "8", "--lr", "1e-4", *more,
    ]  # fmt: skip


def test_report_figure_and_numbers(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batches that the command sampled, measured again by the naive float64 version."""
    batches = []
    measure = calibration.measure_step
    monkeypatch.setattr(
        calibration,
        "measure_step",
        lambda policy, batch, *a, **k: batches.append(batch) or measure(policy, batch, *a, **k),
    )
    assert main(arguments(inputs, tmp_path, "--steps", "2", "--weight-decay", "0")) == 0
    output = capsys.readouterr().out
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert (tmp_path / "calibration.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "calibration.svg").read_text()

    from transformers import AutoModelForCausalLM

    naive = NaiveRun(
        AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float64), 1e-4, 50, 1.0
    )
    for step, batch in zip(found["steps"], batches, strict=True):
        m_h, m_f = naive.shifts(batch).T
        old = naive.log_probs(batch)
        naive.step(batch)
        kl = np.array(
            [np.exp(p) @ (p - q) for p, q in zip(old, naive.log_probs(batch), strict=True)]
        )
        assert step["kl_token_mean/all"] == pytest.approx(
            kl.mean(), rel=0.02
        )  # float32 against float64
        assert step["tokens"] == len(kl)
    proposal = found["proposal"]
    assert proposal["policy_shift_max"] == pytest.approx(
        np.quantile(m_f, 0.98), rel=0.11
    )  # rounded up to two digits
    assert proposal["objective_shift_max"] == pytest.approx(
        np.quantile(np.abs(m_h), 0.98), rel=0.11
    )
    assert proposal["scale"] == pytest.approx((DELTA / kl.mean()) ** 0.5, rel=0.02)
    own = next(
        r for r in found["predictors"] if (r["predictor"], r["depth"]) == ("policy_shift", "all")
    )
    ratio = np.median(kl / m_f)
    assert own["ratio_50"] == pytest.approx(ratio, rel=0.05)
    assert proposal["overrides"]["token filter at fixed thresholds"] in output
    assert f"policy_shift_max={proposal['policy_shift_max']:.2g}" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-n", "3"], "-n 3: expected at least 2, and a divisor of --batch 8"),
        (["--lr", "0"], "--lr 0.0: expected a positive number"),
        (["--rejection", "1"], "--rejection 1.0"),
        (["--depths", "head"], "'all' among them"),
        (["--batch", "160"], "16 problems, but a step of --batch 160 with -n 4 takes 40"),
        (["--reward", "score"], "expected module:function"),
        (["--reward", "capo_verl.data.rewards.math_answers:nothing"], "nothing"),
        (["--model", "missing_folder"], "no such folder"),
        (["--data", "missing.parquet"], "no such file"),
        (["--device", "cuda"], "torch sees no GPU"),
    ],
)
def test_bad_input_is_one_sentence(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(arguments(inputs, tmp_path, *change)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_equal_rewards_are_explained(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = tmp_path / "constant.py"
    reward.write_text("def compute_score(**_):\n    return 1.0\n")
    assert (
        main(arguments(inputs, tmp_path, "--steps", "1", "--reward", f"{reward}:compute_score"))
        == 2
    )
    assert "the rewards of every group were equal" in capsys.readouterr().err


def test_rewards_by_data_source() -> None:
    from capo_verl.data import gym

    entry = {
        "question": "",
        "answer": "nus",
        "metadata": {"source_dataset": "spell_backward", "word": "sun"},
    }
    extra = {"entry": gym.dump_entry(entry)}
    assert by_data_source("reasoning_gym/spell_backward", "nus", "nus", extra)["acc"] == 1.0
    assert by_data_source("openai/gsm8k", "so it is #### 12", "12") == 1.0
    unknown = Problem("k", "nobody/knows", [], "1", {})
    with pytest.raises(ValueError, match="no reward for data_source='nobody/knows'"):
        load_reward(None, [unknown])
