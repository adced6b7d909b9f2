# SPDX-License-Identifier: Apache-2.0
"""The command ``capo-verl``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from capo_verl.cli import doctor, quickstart


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="capo-verl", description="CAPO for verl and Megatron")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in (doctor, quickstart):
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    return int(args.run(args))
