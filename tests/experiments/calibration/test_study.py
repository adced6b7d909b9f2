# SPDX-License-Identifier: Apache-2.0
"""The calibration study: a run of the tiny tier, its tables, and the committed ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from capo_verl.commands.calibrate.statistics import spearman
from capo_verl.experiments.calibration import evidence, study_cli
from capo_verl.experiments.calibration.pretrained_study import compute_score
from capo_verl.experiments.calibration.study import TinyStudy, run_tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """A short run from an untrained model, whose reward is the share of even tokens."""
    from capo_verl.experiments.study import warm_start
    from capo_verl.experiments.study.model import ModelConfig, TinyTransformer
    from capo_verl.experiments.study.tasks import make_task

    task = make_task("sort8")
    task.reward = lambda problems, responses: (responses % 2 == 0).float().mean(1)

    def base_policy(config):
        length = task.prompt_length + task.response_length
        return TinyTransformer(task.vocab_size, length, 0, ModelConfig(layers=config.layers)), task

    patch = pytest.MonkeyPatch()
    patch.setattr(warm_start, "base_policy", base_policy)
    study = TinyStudy(
        tasks=("sort8",), seeds=(1, 2), lrs={"adam": (1e-3,)}, steps=14, every=2, warmup=4
    )
    seen = []
    results = run_tiny(study, seen.append)
    patch.undo()
    assert seen == ["sort8 adam 0.001 seed 1", "sort8 adam 0.001 seed 2"]
    folder = tmp_path_factory.mktemp("results")
    evidence.save(results, folder, replace=("tiny",))
    evidence.save(results, folder, replace=("tiny",))  # again: nothing is there twice
    return evidence.load(folder)


def test_rows_and_phases(frames: dict[str, pd.DataFrame]) -> None:
    steps, batches, tokens = (frames[name] for name in evidence.FILES)
    assert sorted(batches["step"].unique()) == [4, 6, 8, 10, 12]
    assert len(batches) == 2 * 5
    assert len(steps) == 10 * 4 * (9 + 1)
    assert len(tokens) == 10 * 48
    assert set(steps.loc[steps["step"] < 7, "phase"]) == {"early"}
    first = batches[(batches["seed"] == 1) & (batches["step"] == 4)].iloc[0]
    assert first["kl/all"] > first["kl/last_half"] > first["kl/last_layer"] > first["kl/head"] > 0
    assert first["head_step"] == pytest.approx(first["kl/head"], rel=0.02)


def test_tables_hold_the_means_of_the_steps(frames: dict[str, pd.DataFrame]) -> None:
    steps = frames["calibration"]
    text = evidence.markdown(frames)
    chosen = steps[
        (steps["depth"] == "all") & (steps["target"] == "kl") & (steps["predictor"] == "entropy")
    ]
    row = next(line for line in text.splitlines() if line.startswith("| entropy"))
    assert row.startswith(f"| entropy | {chosen['spearman'].mean():.2f} [")
    tokens = frames["calibration_tokens"]
    assert (
        f"{spearman(tokens['policy_shift'].to_numpy(), tokens['kl'].to_numpy()):.2f} (sort8, Adam)"
        in text
    )
    own = steps[
        (steps["target"] == "kl")
        & (steps["predictor"] == "policy_shift")
        & (steps["depth"] == "head")
    ]
    middle = float(np.exp(np.log(own["ratio_50"].astype(float)).mean()))
    assert f"| sort8, Adam | ratio | {evidence.tables.magnitude(middle)} (" in text


def test_figures_are_drawn(frames: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    paths = evidence.draw(frames, tmp_path)
    assert [p.stem for p in paths if p.suffix == ".png"] == list(evidence.FIGURES)
    assert all(p.stat().st_size > 5_000 for p in paths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tiny: {task: sort8}", "tiny.task: unknown key"),
        ("tiny: {steps: 5}", "nothing is measured in the first 10 steps"),
        ("tiny: {lrs: {lion: [1]}}", "tiny.lrs.lion: expected adam or sgd"),
        ("tiny: {every: 0}", "tiny.every=0"),
        ("large: {}", "unknown part 'large'"),
        ("", "expected tiny and smollm2"),
    ],
)
def test_a_wrong_study_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    assert study_cli.main(["run", str(file), "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_shipped_study_is_valid() -> None:
    parts = study_cli.read(ROOT / "capo_verl/experiments/calibration/study.yaml")
    assert set(parts) == {"tiny", "smollm2"}
    assert len(parts["tiny"].runs()) == 18


def test_last_number_of_a_sentence() -> None:
    for answer in ("3", "It appears three times.", "not 2 but 3", "Three", "2, no: three times"):
        assert compute_score("x", answer, "3") == 1.0, answer
    for answer in ("", "none", "3 or 2", "thirty", "once", "33"):
        assert compute_score("x", answer, "3") == 0.0, answer
    assert compute_score("x", "It appears twice.", "2") == 1.0


def test_the_committed_page_is_what_its_data_give() -> None:
    folder = ROOT / study_cli.RESULTS
    page = (folder / evidence.PAGE).read_text(encoding="utf-8")
    assert evidence.markdown(evidence.load(folder)) == page
    assert max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 100
    assert [name for name in evidence.FIGURES if not (folder / f"{name}.png").exists()] == []
