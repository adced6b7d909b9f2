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
"""


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
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides for the example"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the checks and print them; returns the exit code."""
    problem = _problem(args)
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
    from capo_verl.plugin import stack

    options = Options(
        kernels=not args.no_kernels,
        ray=not args.no_ray,
        ray_address=args.ray_address or os.environ.get("RAY_ADDRESS"),
        example=args.example,
        overrides=args.overrides,
    )
    reports = stack.check_all()

    def tell(result: Result) -> None:
        if not args.json:
            print(verdict.row(result), flush=True)

    if not args.json:
        print(
            f"Platform: {verdict.platform() or 'detected by verl (VERL_PLATFORM=cpu for the CPU)'}",
            flush=True,
        )
    results = examine(options, reports, tell)
    if args.json:
        print(json.dumps(verdict.as_dict(results, reports), indent=2))
    else:
        print(f"\n{verdict.summary(results)}")
        table = software.table(reports)
        if table:
            print(f"\n{table}")
    return verdict.exit_code(results)


def _problem(args: argparse.Namespace) -> str | None:
    """The mistake in the command line, in one sentence; None if nothing is."""
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
