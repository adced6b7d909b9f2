# SPDX-License-Identifier: Apache-2.0
"""The command line of ``capo_verl.experiments.calibration``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capo_verl.experiments.calibration import evidence
from capo_verl.experiments.calibration.pretrained_study import PretrainedStudy, run_smollm2
from capo_verl.experiments.calibration.study import TinyStudy, build, run_tiny

RESULTS = Path("capo_verl/experiments/results")
PARTS = {"tiny": TinyStudy, "smollm2": PretrainedStudy}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    parser = argparse.ArgumentParser(
        prog="calibration_study", description="Do m_F and m_H predict what happens?"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, then write tables and figures")
    run.add_argument("study", type=Path, help="YAML")
    run.add_argument(
        "--only", choices=tuple(PARTS), help="one part; what is there of the other part stays"
    )
    run.add_argument("--output", type=Path, required=True)
    draw = commands.add_parser("draw", help="tables and figures from the parquet files of a folder")
    draw.add_argument("output", type=Path, nargs="?", default=RESULTS, help=f"default: {RESULTS}")
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            parts = read(args.study)
            chosen = {name: part for name, part in parts.items() if args.only in (None, name)}
            if not chosen:
                raise ValueError(f"--only {args.only}: {args.study} has no such part")
            _run(chosen, args.output)
        frames = evidence.load(args.output)
        page = args.output / evidence.PAGE
        page.write_text(evidence.markdown(frames), encoding="utf-8")
        written = evidence.draw(frames, args.output)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"calibration_study: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(map(str, [page, *written])))
    return 0


def read(path: Path) -> dict[str, Any]:
    """The parts of a study.

    Raises:
        ValueError: for an unknown part or key, or a wrong value.
    """
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: expected {' and '.join(PARTS)}, each with its keys")
    unknown = sorted(set(content) - set(PARTS))
    if unknown:
        raise ValueError(f"{path}: unknown part {unknown[0]!r}; expected {', '.join(PARTS)}")
    return {
        name: build(PARTS[name], content[name] or {}, name) for name in PARTS if name in content
    }


def _run(parts: Mapping[str, Any], output: Path) -> None:
    """Each part is on disk once it is complete."""
    from rich.console import Console
    from rich.progress import (
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        if "tiny" in parts:
            bar = progress.add_task("tiny tier", total=len(parts["tiny"].runs()))

            def advance(what: str) -> None:
                progress.advance(bar)
                if not console.is_terminal:
                    console.print(what, highlight=False)

            evidence.save(run_tiny(parts["tiny"], advance), output, replace=("tiny",))
        if "smollm2" in parts:
            found = run_smollm2(parts["smollm2"], lambda line: console.print(line, highlight=False))
            evidence.save(found, output, replace=("SmolLM2-135M",))
