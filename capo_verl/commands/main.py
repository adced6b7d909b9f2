# SPDX-License-Identifier: Apache-2.0
"""The command ``capo-verl``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from capo_verl import __version__
from capo_verl.commands import plot, quickstart, report
from capo_verl.commands.calibrate import command as calibrate
from capo_verl.commands.doctor import command as doctor
from capo_verl.plugin.missing_packages import missing

COMMANDS = {
    doctor: "cpu", quickstart: "cpu", plot: "viewer", report: "viewer", calibrate: "cpu",
}  # fmt: skip
"""Each a file of its own, with ``add_parser(subparsers)``, which sets ``run`` to what runs it, and
the extra that installs what it needs. Heavy imports belong in ``run``.
"""


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
    # argparse takes positional arguments in one run only; Hydra overrides may come after an option
    # as well.
    if rest and (not hasattr(args, "overrides") or any(r.startswith("-") for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return int(args.run(args))
    except ImportError as error:
        name = args.command
        extra = next(
            extra for command, extra in COMMANDS.items() if command.__name__.endswith(f".{name}")
        )
        print(missing(f"capo-verl {name}", error, extra), file=sys.stderr)
        return 2
