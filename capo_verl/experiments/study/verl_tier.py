# SPDX-License-Identifier: Apache-2.0
"""The verl tier: real ``main_ppo`` runs by this repository's launchers, read into curves."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from capo_verl.cpu.quickstart.log import failure_report
from capo_verl.cpu.quickstart.records import held_out_accuracy
from capo_verl.experiments.study.grid import PlannedRun
from capo_verl.experiments.study.verl_config import VerlRunConfig
from capo_verl.viewer.file_log import Entry, FileLog

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
SCRIPTS = {"quickstart": "run_quickstart_cpu.sh", "smollm2": "run_smollm2_135m_cpu.sh"}
COLUMNS = {
    "critic/score/mean": "reward",
    "actor/entropy": "entropy",
    "actor/grad_norm": "grad_norm",
    "response_length/mean": "length",
    "capo/kl_mean": "kl",
    "capo/lr_scale": "scale",
    "capo/rejection_rate": "rejection",
}
"""verl's metric -> column of a curve."""


def train_verl(run: PlannedRun, results: Path) -> list[dict[str, float]]:
    """One run; its files are in ``results/verl/RUN_ID``.

    Returns:
        The curve, see :func:`read_curve`.

    Raises:
        RuntimeError: if the launcher fails; with what its log says.
    """
    from capo_verl.cpu.quickstart.launcher_process import LauncherProcess

    config: VerlRunConfig = run.config
    folder = (results / "verl" / run.run_id).resolve()
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted attempt
    folder.mkdir(parents=True)
    log = folder / "train.log"
    with LauncherProcess(command(config), environment(config, folder), log) as launcher:
        code = launcher.wait()
    if code != 0:
        report = failure_report(log.read_text(encoding="utf-8", errors="replace"))
        raise RuntimeError(f"exit code {code}: " + " | ".join(report[-5:]))
    entries = FileLog(folder / "metrics.jsonl").new_entries()
    return read_curve(entries, completions_per_step(folder), drops_tokens(folder))


def command(config: VerlRunConfig) -> list[str]:
    """The launcher and its overrides; a method's come last.

    Raises:
        RuntimeError: if this package was not installed in place, so that there is no launcher.
    """
    launcher = EXAMPLES / SCRIPTS[config.launcher]
    if not launcher.exists():
        raise RuntimeError(
            f"{launcher} is missing: install a checkout of the repository in place, pip install -e "
            "'.[cpu,study]'"
        )
    return ["bash", str(launcher), *config.settings, *config.overrides]


def environment(config: VerlRunConfig, folder: Path) -> dict[str, str]:
    """The launcher's environment: this process's, and the run's own settings."""
    given = {
        **os.environ,
        "PYTHON": sys.executable,
        "SEED": str(config.seed),
        "ACTOR_LR": repr(config.lr),
        "TOTAL_TRAINING_STEPS": str(config.steps),
        "TEST_FREQ": str(max(1, config.steps // config.evaluations)),
        "VAL_BEFORE_TRAIN": "True",
        "OUTPUT_DIR": str(folder),
        "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
    }
    if config.launcher == "quickstart":
        from rich.console import Console

        from capo_verl.cpu.quickstart.display import Display
        from capo_verl.cpu.quickstart.runner import prepare

        with open(os.devnull, "w") as silent:
            prepared = prepare(Display(Console(file=silent)))
        given.update(DATA_DIR=str(prepared.data_dir), MODEL_PATH=str(prepared.model_path))
    return given


def completions_per_step(folder: Path) -> int:
    """Completions per step, from the configuration that verl resolved."""
    from capo_verl.cpu.quickstart.runner import RunShape

    return RunShape.read(folder).completions_per_step


def drops_tokens(folder: Path) -> bool:
    """True if tokens outside the trust region leave the loss.

    The configuration is the one that verl resolved.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.load(folder / "hydra" / ".hydra" / "config.yaml")
    capo = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.capo")
    return capo is not None and (capo.mode, capo.weighting) == ("filter", "hard")


def read_curve(entries: Iterable[Entry], completions: int, drops: bool) -> list[dict[str, float]]:
    """Curve of verl's records: a row per validation, with the means of the steps before it.

    Args:
        entries: as verl's file logger writes them; the first is the validation before training.
        completions: per step.
        drops: whether rejected tokens leave the loss.

    Raises:
        RuntimeError: if there is no validation before training, or none after it.
    """
    from capo_verl.experiments.study.loop import Curve

    curve = Curve()
    tokens = accepted = seconds = 0.0
    for entry in entries:
        step, data = entry
        curve.add(**{column: data.get(metric) for metric, column in COLUMNS.items()})
        if "response_length/mean" in data:
            of_step = completions * data["response_length/mean"]
            tokens += of_step
            accepted += of_step * (1 - data.get("capo/rejection_rate", 0.0) * drops)
            seconds += data.get("perf/time_per_step") or 0.0
        accuracy = held_out_accuracy(data)
        if accuracy is not None:
            curve.close(
                step=step,
                completions=step * completions,
                tokens=tokens,
                accepted_tokens=accepted,
                seconds=seconds,
                accuracy=accuracy,
            )
    if len(curve.rows) < 2 or curve.rows[0]["step"] != 0:
        raise RuntimeError(
            "the metrics hold no accuracy before and after training: trainer.test_freq, "
            "trainer.val_before_train"
        )
    return curve.rows
