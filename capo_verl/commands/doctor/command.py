# SPDX-License-Identifier: Apache-2.0
"""``capo-verl doctor``: check that everything is in place for a run with CAPO, else say what to
do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from capo_verl.commands.refusal import refuse

EPILOG = """exit codes:
  0  nothing is broken (warnings and skipped checks allowed)
  1  something is broken: the checks marked FAIL say what to do
  2  wrong usage

examples:
  capo-verl doctor
  capo-verl doctor --json --no-ray --no-kernels
  capo-verl doctor --example examples/run_qwen2_5_math_7b_megatron.sh +capo=grpo
  capo-verl doctor --gpu --output gpu.json
"""
OTHERS = ("example", "ray_address", "no_ray", "no_kernels")
"""Options of the checks that ``--gpu`` leaves out."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check the installation, and whether an example would run here; exit code 1 if "
        "something is broken",
        description="Check software, plugin, engines, switch, kernels and Ray workers, in less "
        "than a minute. Every check is made, "
        "whatever the others find; docs/doctor.md describes them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )
    ray = parser.add_mutually_exclusive_group()
    ray.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="look at the workers of this Ray (default: $RAY_ADDRESS, else its own)",
    )
    ray.add_argument("--no-ray", action="store_true", help="do not look at Ray workers")
    parser.add_argument(
        "--no-kernels", action="store_true", help="do not compile or run the Triton kernels"
    )
    parser.add_argument(
        "--example",
        type=Path,
        metavar="SCRIPT",
        help="launcher whose configuration, memory and disk to look at",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the JSON object to a file"
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="instead of all this: kernels, speed and training on one GPU of 24 GB, in ten minutes",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="of --gpu; cpu rehearses it with small sizes (default: cuda)",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides for the example"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the checks and print them; returns the exit code."""
    problem = _problem(args)
    if problem is None and args.gpu:
        from capo_verl.commands.doctor.gpu.parts import refusal

        problem = refusal(args.device or "cuda")
    if problem:
        return refuse("doctor", problem)
    with _without_remarks():
        return _examine(args)


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence what verl and Megatron remark while they are imported, on optional packages and on
    the platform: a check says what matters of it.
    """
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def _examine(args: argparse.Namespace) -> int:
    from capo_verl.commands.doctor import software, verdict
    from capo_verl.commands.doctor.check import Result
    from capo_verl.commands.doctor.checks import Options, examine
    from capo_verl.commands.doctor.gpu import parts
    from capo_verl.plugin import stack

    options = Options(
        kernels=not args.no_kernels,
        ray=not args.no_ray,
        ray_address=args.ray_address or os.environ.get("RAY_ADDRESS"),
        example=args.example,
        overrides=args.overrides,
    )
    reports = stack.check_all()
    device = parts.describe(args.device or "cuda") if args.gpu else None

    def tell(result: Result) -> None:
        if not args.json:
            print(verdict.row(result), flush=True)

    platform = verdict.platform() or "detected by verl (VERL_PLATFORM=cpu for the CPU)"
    if not args.json:
        print(f"Device: {device}" if args.gpu else f"Platform: {platform}", flush=True)
    if args.gpu:
        results = parts.examine(args.device or "cuda", tell)
    else:
        results = examine(options, reports, tell)
    found = json.dumps(verdict.as_dict(results, reports, device), indent=2)
    if args.output is not None:
        args.output.write_text(found + "\n")
    if args.json:
        print(found)
    else:
        print(f"\n{verdict.summary(results)}")
        table = verdict.short(results) if args.gpu else software.table(reports)
        if table:
            print(f"\n{table}")
    return verdict.exit_code(results)


def _problem(args: argparse.Namespace) -> str | None:
    """The mistake in the command line, in one sentence; None if nothing is."""
    unused = [name for name in OTHERS if getattr(args, name)]
    if args.gpu and (unused or args.overrides):
        left_out = f"--{unused[0].replace('_', '-')}" if unused else repr(args.overrides[0])
        return f"--gpu looks at one GPU and nothing else: leave out {left_out}"
    if args.device is not None and not args.gpu:
        return "--device is the device of --gpu: add --gpu, or leave it out"
    if args.output is not None and not args.output.absolute().parent.is_dir():
        return f"--output {args.output}: its folder does not exist"
    if args.overrides and args.example is None:
        return (
            f"{args.overrides[0]!r} is an override for an example: name its launcher with --example"
        )
    if args.example is not None and not args.example.is_file():
        return (
            f"--example {args.example} does not exist: name a launcher such as "
            "examples/run_quickstart_cpu.sh"
        )
    wrong = [
        override
        for override in args.overrides
        if "=" not in override and not override.startswith("~")
    ]
    return f"{wrong[0]!r} is not a Hydra override: write key=value" if wrong else None
