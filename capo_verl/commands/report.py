# SPDX-License-Identifier: Apache-2.0
"""``capo-verl report RUN…``: one HTML page about runs, for any browser, without a network."""

from __future__ import annotations

import argparse
from pathlib import Path

from capo_verl.commands.plot import add_run_arguments, tell_notes
from capo_verl.commands.refusal import refuse
from capo_verl.viewer.notes import reason, visible
from capo_verl.viewer.series import Run


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "report",
        help="write one HTML page: interactive curves, configurations side by side, rejected "
        "tokens in their text",
        description="Write a self-contained HTML page about runs. Token samples: set "
        "capo.sample_tokens_every in the run.",
        epilog="Example: capo-verl report outputs/grpo outputs/capo --output report.html",
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="the page (default: report.html)"
    )
    parser.add_argument(
        "--tokenizer", help="folder or name of a Hugging Face tokenizer, for samples without text"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page; 2 with one line about what is wrong."""
    try:
        from capo_verl.viewer.choose import choose
        from capo_verl.viewer.groups import group_runs
        from capo_verl.viewer.load import load_runs
        from capo_verl.viewer.page import write_page

        lost: list[str] = []
        runs = choose(load_runs(args.runs, lost.append), args.where)
        if args.tokenizer:
            _put_into_text(runs, args.tokenizer)
        write_page(group_runs(runs, args.group_by), args.output, notes=lost)
    except (ValueError, OSError) as e:
        return refuse("report", visible(str(e)))
    tell_notes("report", runs, lost)
    samples = sum(len(run.samples) for run in runs)
    print(
        f"{args.output}: {len(runs)} runs, {samples} sequences of sampled tokens, "
        f"{args.output.stat().st_size / 1e6:.1f} MB"
    )
    return 0


def _put_into_text(runs: list[Run], name: str) -> None:
    from transformers import AutoTokenizer

    from capo_verl.viewer.samples import put_into_text

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as e:  # of many kinds
        raise ValueError(f"--tokenizer {name}: cannot be loaded ({reason(e)})") from e
    for run in runs:
        try:
            put_into_text(run.samples, tokenizer)
        except Exception as e:  # of many kinds: an id that the tokenizer does not have, say
            run.notes.append(f"{run.source}: --tokenizer {name} cannot decode it ({reason(e)})")
