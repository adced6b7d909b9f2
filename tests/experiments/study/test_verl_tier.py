# SPDX-License-Identifier: Apache-2.0
"""The verl tier without a trainer: its command line, and verl's records as a curve."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from capo_verl.experiments.study.grid import parse_study
from capo_verl.experiments.study.measures import summarise
from capo_verl.experiments.study.verl_config import VerlRunConfig
from capo_verl.experiments.study.verl_tier import command, drops_tokens, environment, read_curve
from capo_verl.viewer.file_log import Entry, FileLog

RECORDED = Path(__file__).resolve().parents[2] / "cpu" / "quickstart" / "data"


def test_records_become_a_curve():
    entries = [
        Entry(0, {"val-core/x/acc/mean@1": 0.4}),
        Entry(
            1,
            {"critic/score/mean": 0.5, "response_length/mean": 8.0, "capo/kl_mean": 1e-4,
                "perf/time_per_step": 2.0},
        ),
        Entry(
            2,
            {
                "critic/score/mean": 0.7, "response_length/mean": 6.0, "capo/kl_mean": 3e-4,
                "capo/rejection_rate": 0.25,
                "capo/lr_scale": 0.5, "perf/time_per_step": 3.0, "val-core/x/acc/mean@1": 0.6,
                "actor/entropy": None,
            },
        ),
    ]  # fmt: skip
    base, row = read_curve(entries, completions=16, drops=True)
    assert base == {
        "step": 0,
        "completions": 0,
        "tokens": 0,
        "accepted_tokens": 0,
        "seconds": 0,
        "accuracy": 0.4,
    }
    assert row == {
        "step": 2, "completions": 32, "tokens": 16 * 14, "accepted_tokens": 16 * 8 + 72,
        "seconds": 5.0, "accuracy": 0.6,
        "reward": pytest.approx(0.6), "length": 7.0, "kl": pytest.approx(2e-4), "kl_max": 3e-4,
        "scale": 0.5, "rejection": 0.25,
    }  # fmt: skip
    assert read_curve(entries, completions=16, drops=False)[1]["accepted_tokens"] == 16 * 14
    assert summarise([base, row])["final"] == 0.6


def test_a_recorded_run_can_be_read():
    entries = FileLog(RECORDED / "grpo.jsonl").new_entries()
    rows = read_curve(entries, completions=64, drops=False)
    assert rows[0]["step"] == 0 and all(0 <= row["accuracy"] <= 1 for row in rows) and len(rows) > 1
    assert "rejection" not in rows[-1] and rows[-1]["tokens"] > 0


@pytest.mark.parametrize(
    ("switch", "drops"),
    [("grpo", True), ("track", False), ("soft", False), ("kl_budget", False), (None, False)],
)
def test_who_drops_tokens(switch, drops, tmp_path):
    from capo_verl.config import verl_knobs

    block = {} if switch is None else {"capo": verl_knobs(switch)}
    (tmp_path / "hydra/.hydra").mkdir(parents=True)
    config = {"actor_rollout_ref": {"actor": {"policy_loss": block}}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "hydra/.hydra/config.yaml")
    assert drops_tokens(tmp_path) is drops


def test_a_run_without_validation_is_an_error():
    with pytest.raises(RuntimeError, match="test_freq"):
        read_curve([Entry(1, {"critic/score/mean": 0.5})], 8, drops=False)


def test_launcher_and_environment(tmp_path):
    config = VerlRunConfig(
        launcher="smollm2",
        seed=3,
        lr=1e-5,
        steps=8,
        evaluations=2,
        overrides=["+capo=soft"],
        settings=["a=1"],
    )
    found = command(config)
    assert (
        Path(found[1]).name == "run_smollm2_135m_cpu.sh"
        and Path(found[1]).exists()
        and found[2:] == ["a=1", "+capo=soft"]
    )
    given = environment(config, tmp_path)
    expected = {
        "SEED": "3",
        "ACTOR_LR": "1e-05",
        "TOTAL_TRAINING_STEPS": "8",
        "TEST_FREQ": "4",
        "VAL_BEFORE_TRAIN": "True",
    }
    assert expected.items() <= given.items() and given["VERL_FILE_LOGGER_PATH"] == str(
        tmp_path / "metrics.jsonl"
    )


def test_bad_runs_are_refused():
    with pytest.raises(ValueError, match="launcher='tpu'"):
        VerlRunConfig(launcher="tpu")
    with pytest.raises(ValueError, match="evaluations=3: must divide steps=20"):
        VerlRunConfig(evaluations=3)
    with pytest.raises(ValueError, match="methods.a: task is not a key of a verl run"):
        parse_study(
            {"tier": "verl", "control": "a", "methods": {"a": {}}, "grid": {"task": ["sort8"]}}
        )
