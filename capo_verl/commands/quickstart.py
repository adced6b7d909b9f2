# SPDX-License-Identifier: Apache-2.0
"""``capo-verl quickstart``: a complete RL run on a CPU, in minutes."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import time
from pathlib import Path

from capo_verl.commands.refusal import refuse
from capo_verl.plugin.compat import CPU_ROLLOUTS


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "quickstart",
        help="train a small model with CAPO or GRPO through verl and Megatron on a CPU",
        description="Train a small model on a reasoning-gym task through verl's main_ppo and "
        "Megatron (TP2), on a CPU.",
        epilog="Example: capo-verl quickstart GRPO trainer.total_training_steps=40",
    )
    parser.add_argument("algorithm", nargs="?", default="CAPO", help="CAPO (default) or GRPO")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides for verl's main_ppo"
    )
    parser.add_argument(
        "--rollout",
        metavar="BACKEND",
        help=f"who generates: {' or '.join(CPU_ROLLOUTS)} (default: INFER_BACKEND, else hf)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the run (default: outputs/quickstart/<algorithm>-<time>)",
    )
    parser.add_argument(
        "--prepare-only", action="store_true", help="make data and model, print their paths, stop"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the quickstart; returns the exit code."""
    from capo_verl.cpu.quickstart import runner
    from capo_verl.cpu.quickstart.display import Display
    from capo_verl.plugin.checks.vllm_on_cpu import rollout_problem

    for package in (
        "mbridge",
        "megatron.core",
        "ray",
        "verl",
    ):  # imported by the launcher, minutes from now
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    algorithm, overrides = args.algorithm.upper(), list(args.overrides)
    if "=" in args.algorithm:  # overrides without an algorithm
        algorithm, overrides = "CAPO", [args.algorithm, *overrides]
    rollout = args.rollout or os.environ.get("INFER_BACKEND") or "hf"
    problem = _problem(algorithm, overrides, runner) or rollout_problem(rollout)
    if problem:
        return refuse("quickstart", problem)

    # Whatever ends us ends the run we started. SIGINT too: a shell's background jobs start with it
    # ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    display = Display()
    try:
        if args.prepare_only:
            prepared = runner.prepare(display)
            display.say(f"export DATA_DIR={prepared.data_dir}")
            display.say(f"export MODEL_PATH={prepared.model_path}")
            return 0
        stamp = time.strftime("%Y%m%d-%H%M%S")
        output = args.output or Path("outputs") / "quickstart" / f"{algorithm.lower()}-{stamp}"
        return runner.run(algorithm, overrides, output.resolve(), display, rollout)
    except KeyboardInterrupt:
        display.say("Stopped.")
        return 130


def _problem(algorithm: str, overrides: list[str], runner: object) -> str | None:
    """The mistake in the command line, in one sentence; None if nothing is."""
    known = runner.ALGORITHMS  # type: ignore[attr-defined]
    if algorithm not in known:
        return f"unknown algorithm {algorithm!r}; use one of {', '.join(known)}"
    wrong = [
        override for override in overrides if "=" not in override and not override.startswith("~")
    ]
    if wrong:
        return f"{wrong[0]!r} is not a Hydra override; write key=value"
    launcher = runner.LAUNCHER  # type: ignore[attr-defined]
    if not launcher.exists():
        return (
            f"{launcher} is missing: install a checkout of the repository in place, pip install -e "
            "'.[cpu]'"
        )
    return None
