# SPDX-License-Identifier: Apache-2.0
"""``capo-verl calibrate``: measure what m_F and m_H predict for a model on its data, and propose
thresholds.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from capo_verl.commands.refusal import refuse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure on your model and data what m_F and m_H predict; propose thresholds and a KL "
        "budget",
        description="Sample completions, train a few GRPO steps in memory, and compare what CAPO "
        "predicts for every token with what happened: the exact KL divergence and the change of "
        "the objective. The model on disk is not changed.",
        epilog="Example: capo-verl calibrate --model Qwen/Qwen2.5-0.5B-Instruct --data "
        "train.parquet --lr 3e-6 --device cuda",
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        help="Hugging Face folder or name, verl's global_step_N, or a run's checkpoint folder",
    )
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="problems in verl's schema (parquet, jsonl)",
    )
    add(
        "--output",
        type=Path,
        default=Path("outputs/calibration"),
        help="folder; default: outputs/calibration",
    )
    add("--steps", type=int, default=4, help="optimizer steps to measure; default: 4")
    add("--batch", type=int, default=32, help="completions per step; default: 32")
    add("-n", type=int, default=8, help="completions per prompt; default: 8")
    add(
        "--lr",
        type=float,
        default=3e-6,
        help="learning rate of AdamW, as in your run; default: 3e-6",
    )
    add("--weight-decay", type=float, default=0.01, help="default: 0.01, as verl's")
    add("--max-gradient-norm", type=float, default=1.0, help="default: 1.0, as verl's")
    add("--top-k", type=int, default=50, help="capo.top_k; default: 50")
    add("--max-prompt-length", type=int, default=1024, help="tokens; default: 1024")
    add("--max-response-length", type=int, default=512, help="tokens; default: 512")
    add(
        "--rows-per-pass",
        type=int,
        default=8,
        help="sequences per forward and backward pass; default: 8",
    )
    add(
        "--depths",
        nargs="+",
        default=["head", "all"],
        help="what to train: head, last_layer, last_half, all; each of the middle two costs one "
        "forward pass; default: head all",
    )
    add(
        "--rejection",
        type=float,
        default=0.02,
        help="share of the tokens each threshold should reject; default: 0.02",
    )
    add(
        "--reward",
        metavar="MODULE:FUNCTION",
        help="reward function (or FILE.py:FUNCTION); default: by data source",
    )
    add("--device", default="cpu", help="cpu, cuda or cuda:N; default: cpu")
    add("--seed", type=int, default=0, help="default: 0")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.device == "cpu":
        os.environ.setdefault(
            "VERL_PLATFORM", "cpu"
        )  # verl looks for an accelerator as it is imported
    from capo_verl.commands.calibrate import calibration

    options = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    try:
        settings = calibration.Settings(
            **{**options, "data": tuple(args.data), "depths": tuple(args.depths)}
        )
        found = calibration.calibrate(
            settings, lambda line: print(line, file=sys.stderr, flush=True)
        )
    except (ValueError, OSError, FloatingPointError) as error:
        return refuse("calibrate", error)
    print("\n".join(calibration.report(settings, found)))
    print("\nwritten: " + ", ".join(map(str, calibration.write(settings, found))))
    return 0
