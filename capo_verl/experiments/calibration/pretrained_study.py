# SPDX-License-Identifier: Apache-2.0
"""The calibration study on a pretrained model, SmolLM2-135M.

It answers reasoning-gym's letter counting freely.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capo_verl.experiments.calibration.study import Results, record

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBER = re.compile(rf"\b(\d+|{'|'.join(WORDS)}|once|twice)\b", re.IGNORECASE)
_SYNONYMS = {"once": "one", "twice": "two"}


@dataclass(frozen=True)
class PretrainedStudy:
    """Key ``smollm2`` of the study's YAML."""

    lrs: tuple[float, ...] = (3e-6, 3e-5)
    steps: int = 4
    batch: int = 24
    n: int = 8
    max_response_length: int = 48
    depths: tuple[str, ...] = ("head", "last_layer", "all")
    top_k: int = 50
    seed: int = 1
    tokens_kept: int = 512

    def __post_init__(self) -> None:
        object.__setattr__(self, "lrs", tuple(float(lr) for lr in self.lrs))
        object.__setattr__(self, "depths", tuple(self.depths))


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    **_: Any,
) -> float:
    """Reward: 1 if the last number in the answer, in digits or as a word, is the right one.

    The model writes sentences.
    """
    found = _NUMBER.findall(solution_str)
    if not found:
        return 0.0
    last = found[-1].lower()
    last = _SYNONYMS.get(last, last)
    return float(str(WORDS.index(last) if last in WORDS else int(last)) == ground_truth)


def run_smollm2(study: PretrainedStudy, say: Callable[[str], None] = lambda line: None) -> Results:
    """A few steps of GRPO per learning rate, each from the pretrained model.

    Raises:
        RuntimeError: if the package that carries the model is not installed, saying how to.
    """
    from capo_verl.commands.calibrate.calibration import Settings, calibrate
    from capo_verl.cpu.smollm2 import pretrained, task

    model, _ = pretrained.prepare_model(1)
    data, _ = task.prepare_data(task.TaskConfig(examples_size=0))
    results = Results()
    for lr in study.lrs:
        say(f"smollm2 at {lr:g}")
        settings = Settings(
            model=str(model), data=(str(data / "train.parquet"),),
            output=Path(tempfile.gettempdir()), steps=study.steps,
            batch=study.batch, n=study.n, lr=lr, weight_decay=0.0, top_k=study.top_k,
            depths=study.depths, seed=study.seed, max_response_length=study.max_response_length,
            reward="capo_verl.experiments.calibration.pretrained_study:compute_score",
        )  # fmt: skip
        found = calibrate(settings, say)
        for step, (measured, reward) in enumerate(
            zip(found.measurements, found.rewards, strict=True)
        ):
            about = {
                "tier": "SmolLM2-135M", "task": "letter_counting", "optimizer": "adam", "lr": lr,
                "seed": study.seed, "step": step, "phase": "first" if step == 0 else "early",
            }  # fmt: skip
            record(results, measured, study.tokens_kept, reward, about)
    return results
