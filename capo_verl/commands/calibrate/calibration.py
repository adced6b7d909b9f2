# SPDX-License-Identifier: Apache-2.0
"""Calibrate on a user's model and data: sample, train a few steps in memory, measure each, propose
settings.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from capo_verl import __version__
from capo_verl.commands.calibrate import tables
from capo_verl.commands.calibrate.policy import DEPTHS, from_hugging_face
from capo_verl.commands.calibrate.predicted import Predictions
from capo_verl.commands.calibrate.propose import Proposal, overrides, propose
from capo_verl.commands.calibrate.sample import load_reward, sample
from capo_verl.commands.calibrate.step import StepMeasurement, measure_step
from capo_verl.config import CapoConfig


@dataclass(frozen=True)
class Settings:
    """Options of ``capo-verl calibrate``.

    Raises:
        ValueError: naming the option, the value found and what is allowed.
    """

    model: str
    data: tuple[str, ...]
    output: Path
    steps: int = 4
    batch: int = 32
    """Completions per step."""
    n: int = 8
    """Completions per prompt."""
    lr: float = 3e-6
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0
    top_k: int = 50
    max_prompt_length: int = 1024
    max_response_length: int = 512
    rows_per_pass: int = 8
    depths: tuple[str, ...] = ("head", "all")
    rejection: float = 0.02
    reward: str | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "top_k",
            "max_prompt_length",
            "max_response_length",
            "rows_per_pass",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1"
                )
        if self.n < 2 or self.batch % self.n:
            raise ValueError(
                f"-n {self.n}: expected at least 2, and a divisor of --batch {self.batch}"
            )
        for name, zero in (("lr", False), ("max_gradient_norm", False), ("weight_decay", True)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                raise ValueError(
                    f"--{name.replace('_', '-')} {value}: expected a "
                    f"{'' if zero else 'positive '}number"
                )
        if not 0 < self.rejection < 1:
            raise ValueError(f"--rejection {self.rejection}: expected a share in (0, 1)")
        unknown = [d for d in self.depths if d not in DEPTHS]
        if unknown or "all" not in self.depths:
            raise ValueError(
                f"--depths {' '.join(self.depths)}: expected some of {', '.join(DEPTHS)}, 'all' "
                "among them"
            )
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: torch sees no GPU; use --device cpu")


@dataclass(frozen=True)
class Calibration:
    """Everything that was measured."""

    measurements: list[StepMeasurement]
    rewards: list[float]
    """Mean reward of each step measured."""
    truncated: list[float]
    """Share of responses cut off, likewise."""
    without_signal: int
    """Batches left out because the rewards of every group were equal."""
    proposal: Proposal


def calibrate(settings: Settings, say: Callable[[str], None] = lambda line: None) -> Calibration:
    """Measure ``settings.steps`` steps of plain GRPO with AdamW in float32; the model on disk is
    not touched.

    Args:
        say: gets a line about each step.

    Raises:
        ValueError, OSError: whatever is wrong with the input, in one sentence; before the model is
            loaded where possible.
    """
    from capo_verl.data.evaluation import generation
    from capo_verl.data.evaluation.model_folder import find_model
    from capo_verl.data.evaluation.problems import read_problems

    problems = read_problems(settings.data)
    per_step = settings.batch // settings.n
    if len(problems) < per_step:
        raise ValueError(
            f"--data: {len(problems)} problems, but a step of --batch {settings.batch} with -n "
            f"{settings.n} takes {per_step}"
        )
    reward = load_reward(settings.reward, problems)
    path = find_model(settings.model)
    tokenizer = generation.load_tokenizer(path)
    prompts = generation.tokenize(problems, tokenizer, settings.max_prompt_length)
    model = _load(path, settings.device)

    policy = from_hugging_face(model)
    optimizer = torch.optim.AdamW(
        policy.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    predictions = Predictions(policy, CapoConfig(top_k=settings.top_k))
    generator = torch.Generator(device=settings.device).manual_seed(settings.seed)
    order = random.Random(settings.seed)
    measurements: list[StepMeasurement] = []
    rewards, truncated, without = [], [], 0
    while len(measurements) < settings.steps:
        chosen = order.sample(problems, per_step)
        batch = sample(
            model, tokenizer, chosen, [prompts[p.key] for p in chosen], settings.n,
            settings.max_response_length, reward, generator,
        )  # fmt: skip
        if not batch.has_signal:
            without += 1
            say(
                f"all rewards of a group are equal (mean {float(batch.rewards.mean()):.2f}): batch "
                f"{without} left out"
            )
            if without > 3 * settings.steps:
                raise ValueError(
                    f"--data: in {without} of {without + len(measurements)} batches the rewards of "
                    "every group were equal, so there is no gradient: take other problems, a "
                    "larger --batch, a larger --max-response-length or a --reward with partial "
                    "credit"
                )
            continue
        measured = measure_step(
            policy, batch.rollouts, optimizer, predictions, depths=settings.depths,
            max_gradient_norm=settings.max_gradient_norm, rows_per_pass=settings.rows_per_pass,
        )  # fmt: skip
        measurements.append(measured)
        rewards.append(float(batch.rewards.mean()))
        truncated.append(batch.truncated)
        kl = measured.batch["kl_token_mean/all"]
        say(
            f"step {len(measurements)}/{settings.steps}: reward {rewards[-1]:.2f}, true KL "
            f"{kl:.2g} nats per token"
        )
    return Calibration(
        measurements, rewards, truncated, without, propose(measurements, settings.rejection)
    )


def _load(path: str, device: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # float32: steps of 1e-6 vanish in bfloat16 weights, and trainers keep float32 masters for the
    # same reason.
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)


def report(settings: Settings, found: Calibration) -> list[str]:
    """Lines to print: what predicts the KL, what a step does, and what to paste."""
    rows = _rows(found)
    table = tables.aggregate(rows, ("depth", "target", "predictor"))
    at_all = table[(table["depth"] == "all") & (table["target"] == "kl")].set_index("predictor")
    objective = table[(table["depth"] == "all") & (table["target"] == "objective")].iloc[0]
    proposal = found.proposal
    own = at_all.loc["policy_shift"]
    trivial = at_all.loc[["entropy", "surprisal", "advantage", "advantage_miss", "hidden"]]
    best = trivial["spearman"].idxmax()
    lines = [
        f"true token KL against m_F (per step, 95 % intervals over {proposal.steps} steps)",
        f"  Spearman            {tables.cell(own, 'spearman')}   (best of the trivial predictors: "
        f"{best} {tables.cell(at_all.loc[best], 'spearman')})",
        f"  finds the top 1 %   AUROC {tables.cell(own, 'auroc')}",
        f"  true / predicted    median {tables.magnitude(own['ratio_50'])}, 10-90 % "
        f"{tables.magnitude(own['ratio_10'])} to "
        f"{tables.magnitude(own['ratio_90'])}; slope {tables.cell(own, 'slope')}",
        f"true change of the objective against m_H: Spearman {tables.cell(objective, 'spearman')}, "
        f"sign right for {100 * objective['same_sign']:.0f} %",
        f"a step at learning rate {settings.lr:g} moves the policy by {proposal.kl:.2g} nats per "
        f"token; a budget of {proposal.delta:g} would multiply the rate by {proposal.scale:.2g}",
        "",
    ]
    for what, text in overrides(proposal).items():
        lines += [f"# {what}", text]
    lines += [
        "",
        f"The fixed thresholds reject {100 * proposal.rejected:.1f} % of the tokens measured here "
        f"({100 * proposal.rejection:g} % by each test). m_F grows with the square of",
        "the learning rate and with the moments' age, and spikes as a policy degrades: with few "
        "steps they are a start, not a steady state.",
    ]
    if proposal.steps < 3 or proposal.kl == 0:
        lines.append("Fewer than three usable steps: raise --steps before relying on them.")
    cut = sum(found.truncated) / len(found.truncated)
    if cut > 0.2:
        lines.append(
            f"{100 * cut:.0f} % of the responses were cut off: raise --max-response-length to that "
            "of your run."
        )
    return lines


def write(settings: Settings, found: Calibration) -> list[Path]:
    """``calibration.json``, ``calibration.png`` and ``.svg`` in ``settings.output``; their
    paths.
    """
    import pandas as pd

    from capo_verl.commands.calibrate import pictures
    from capo_verl.data.prepare import write_json

    settings.output.mkdir(parents=True, exist_ok=True)
    rows = _rows(found)
    table = tables.aggregate(rows, ("depth", "target", "predictor"))
    kept = _used(found.measurements)
    tokens = pd.concat([tables.token_rows(m, 4096, draw=i) for i, m in kept])
    title = (
        f"{Path(settings.model).name}, learning rate {settings.lr:g}, {len(kept)} steps of "
        f"{settings.batch} completions"
    )
    paths = pictures.save(pictures.draw(tokens, table, title), settings.output / "calibration")
    content = {
        "version": __version__,
        "settings": {**asdict(settings), "output": str(settings.output)},
        "proposal": {**asdict(found.proposal), "overrides": overrides(found.proposal)},
        "batches_without_signal": found.without_signal,
        "steps": [
            {"reward": reward, "truncated": cut, "tokens": len(m.tokens["advantage"]), **m.batch}
            for m, reward, cut in zip(
                found.measurements, found.rewards, found.truncated, strict=True
            )
        ],
        "predictors": json.loads(table.to_json(orient="records")),  # NaN becomes null
    }
    write_json(content, settings.output / "calibration.json")
    return [*paths, settings.output / "calibration.json"]


def _used(measurements: Sequence[StepMeasurement]) -> list[tuple[int, StepMeasurement]]:
    numbered = list(enumerate(measurements))
    return numbered[1:] if len(numbered) > 1 else numbered


def _rows(found: Calibration) -> Any:
    import pandas as pd

    return pd.DataFrame(
        [row for i, m in _used(found.measurements) for row in tables.step_rows(m, step=i)]
    )
