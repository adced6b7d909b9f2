#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time, memory and bandwidth of the filter against the formulation as published.

python -m capo_verl.experiments.benchmark [--preset NAME] [--tp N] [--tokens N ...] [--write-docs]

Writes a table, JSON, Markdown and PNG; docs/performance.md says what they mean.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines would go between ours

try:
    import torch
    from rich.console import Console
    from rich.table import Table

    from capo_verl.commands.measure import runner
    from capo_verl.commands.measure.agreement import DisagreementError
    from capo_verl.commands.measure.results import Report
    from capo_verl.commands.measure.targets import judge_targets
    from capo_verl.commands.measure.workload import (
        DEFAULT_PRESETS,
        DEFAULT_TOKENS,
        PRESETS,
        Workload,
    )
    from capo_verl.experiments.benchmark import chart, markdown, profiling
except ImportError as e:
    from capo_verl.plugin.missing_packages import missing

    sys.exit(missing("capo_verl.experiments.benchmark", e, "viewer"))

DOCS = ROOT / "docs/performance.md"
PROFILED_TOKENS = {"cpu": 2048, "cuda": 24576}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Workload]:
    parser = Parser(prog="capo_verl.experiments.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="sizes of a model (default: cpu-small; on a GPU qwen2.5-math-7b)",
    )
    parser.add_argument("--vocab-size", type=positive, metavar="V", help="instead of the preset's")
    parser.add_argument("--hidden-size", type=positive, metavar="H", help="instead of the preset's")
    parser.add_argument(
        "--tp",
        type=positive,
        default=1,
        metavar="N",
        help="measure one of N tensor-parallel ranks (1)",
    )
    parser.add_argument(
        "--tokens", type=positive, nargs="+", metavar="N", help="numbers of tokens (1k to 64k)"
    )
    parser.add_argument("--top-k", type=positive, default=50, metavar="K", help="support size (50)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="of torch on a CPU (1)"
    )
    parser.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="of every cell, at most (5)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/benchmark"),
        metavar="DIR",
        help="for JSON, Markdown, PNG (%(default)s)",
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="put the tables into docs/performance.md"
    )
    parser.add_argument("--profile", action="store_true", help="also write where the time goes")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    preset = args.preset or DEFAULT_PRESETS[device]
    vocab_size, hidden_size = (
        args.vocab_size or PRESETS[preset].vocab_size,
        args.hidden_size or PRESETS[preset].hidden_size,
    )
    changed = (vocab_size, hidden_size) != PRESETS[preset]
    tokens = tuple(sorted(set(args.tokens or DEFAULT_TOKENS[device])))
    try:
        workload = Workload(
            f"V{vocab_size}-H{hidden_size}" if changed else preset,
            vocab_size,
            hidden_size,
            args.tp,
            args.top_k,
            tokens,
            device,
        )
    except ValueError as error:
        parser.error(str(error))
    return args, workload


def show(report: Report, console: Console) -> None:
    table, rows = (
        Table(title=markdown.heading(report), title_justify="left"),
        markdown.cells(report),
    )
    for i, column in enumerate(markdown.COLUMNS):
        words = column.replace(" ", "\n")
        table.add_column(
            words, justify="left" if i == 1 else "right", no_wrap=i != 1, vertical="bottom"
        )
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        table.add_row(*row, end_section=row[0] != following[0])
    console.print(table)
    for line in markdown.growth_lines(report):
        console.print(line, highlight=False)
    for verdict in judge_targets(report):
        console.print(
            f"{'met' if verdict.met else 'MISSED'}: {verdict.target}, measured {verdict.measured}",
            highlight=False,
        )


def main(argv: list[str] | None = None) -> int:
    args, workload = parse(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    if not console.is_terminal:
        console.width = 170
    try:
        if args.write_docs:
            markdown.read_docs(DOCS)
        args.output.mkdir(parents=True, exist_ok=True)
        report = runner.run(
            workload, args.repeats, say=lambda text: console.print(f"... {text}", highlight=False)
        )
        stem = f"{workload.name}-tp{workload.tp}-{workload.device}"
        report.save(args.output / f"{stem}.json")
        (args.output / f"{stem}.md").write_text(markdown.markdown(report))
        chart.save(report, args.output / f"{stem}.png")
        if args.write_docs:
            markdown.update_docs(report, DOCS)
        if args.profile:
            tokens = min(PROFILED_TOKENS[workload.device], workload.tokens[-1])
            for key, text in profiling.profiles(workload, tokens).items():
                (args.output / f"{stem}-profile-{key}.txt").write_text(text)
    except (ValueError, DisagreementError, OSError) as error:
        print(f"capo_verl.experiments.benchmark: {error}", file=sys.stderr)
        return 1
    show(report, console)
    console.print(f"written to {args.output}/{stem}.*", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
