# SPDX-License-Identifier: Apache-2.0
"""The command ``capo-verl``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from capo_verl.cli import calibrate, doctor, plot, quickstart, report

COMMANDS = (doctor, quickstart, plot, report, calibrate)
"""Each a file of its own, with ``add_parser(subparsers)``, which sets ``run`` to what runs it. Heavy imports belong in there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="capo-verl", description="CAPO for verl and Megatron")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    args, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments in one run only; Hydra overrides may come after an option as well.
    if rest and (not hasattr(args, "overrides") or any(r.startswith("-") for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return int(args.run(args))
