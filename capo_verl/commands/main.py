# SPDX-License-Identifier: Apache-2.0
"""The command ``capo-verl``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from capo_verl import __version__
from capo_verl.commands import data, evaluate, plan, plot, quickstart, report
from capo_verl.commands.calibrate import command as calibrate
from capo_verl.commands.doctor import command as doctor
from capo_verl.plugin.missing_packages import missing
from capo_verl.plugin.state import REFUSED

COMMANDS = {
    doctor: "cpu", quickstart: "cpu", data: "data", plan: "cpu", evaluate: "data",
    calibrate: "cpu", plot: "viewer", report: "viewer",
}  # fmt: skip
"""Each a file of its own, with ``add_parser(subparsers)``, which sets ``run`` to what runs it, and
the extra that installs what it needs. Heavy imports belong in ``run``.
"""
REPEATED = ("overrides", "names")
"""Positional arguments that a sub-command takes any number of."""


def make_parser() -> argparse.ArgumentParser:
    """All sub-commands."""
    parser = argparse.ArgumentParser(prog="capo-verl", description="CAPO for verl and Megatron")
    parser.add_argument("--version", action="version", version=f"capo-verl {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code. 2 with one line if a package is missing."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments in one run only; those that repeat may come after an
    # option as well.
    repeated = next((name for name in REPEATED if hasattr(args, name)), None)
    if rest and (repeated is None or any(r.startswith("-") for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest and repeated:
        setattr(args, repeated, [*getattr(args, repeated), *rest])
    try:
        return int(args.run(args))
    except ImportError as error:
        extra = COMMANDS[sys.modules[args.run.__module__]]
        print(missing(f"capo-verl {args.command}", error, extra), file=sys.stderr)
        return REFUSED
