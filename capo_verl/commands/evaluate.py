# SPDX-License-Identifier: Apache-2.0
"""``capo-verl evaluate``: a checkpoint's scores through verl's rollout servers, avg@n and pass@k
with confidence intervals.
"""

from __future__ import annotations

import argparse

from capo_verl.commands.refusal import refuse

EPILOG = """examples:
  capo-verl evaluate --model checkpoints/global_step_60 --data data/aime24/test.parquet -n 32 \\
      --output outputs/eval
  VERL_PLATFORM=cpu capo-verl evaluate --model MODEL --data FILE -n 4 --output outputs/eval
  capo-verl evaluate --data data/aime24/test.parquet --output outputs/eval --score-only
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a checkpoint: avg@n and pass@k per data source",
        description="Score a checkpoint through verl's rollout servers: avg@n and pass@k per data "
        "source, with confidence intervals.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="of verl's config, e.g. actor_rollout_ref.rollout.max_num_seqs=64",
    )
    add(
        "--model",
        help="Hugging Face folder or name, verl's global_step_N, or a run's checkpoint folder (its "
        "latest step)",
    )
    add(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="as `capo-verl data` writes them",
    )
    add(
        "--output",
        required=True,
        metavar="DIR",
        help="completions and results; the same folder again goes on",
    )
    add("-n", type=int, default=1, help="completions per problem; default: 1")
    add("--k", type=int, nargs="+", help="for pass@k; default: powers of two up to n, and n")
    add("--temperature", type=float, default=1.0, help="default: 1.0")
    add("--top-p", type=float, default=1.0, help="default: 1.0")
    add("--top-k", type=int, default=-1, help="default: -1, all")
    add("--max-prompt-length", type=int, default=1024, help="tokens; default: 1024")
    add("--max-response-length", type=int, default=3072, help="tokens; default: 3072")
    add(
        "--backend",
        choices=("vllm", "sglang", "hf"),
        help="default: vllm; hf with VERL_PLATFORM=cpu",
    )
    add("--gpus", type=int, help="per node; default: those there are")
    add("--nodes", type=int, default=1, help="of the Ray cluster at $RAY_ADDRESS; default: 1")
    add("--tp", type=int, default=1, help="GPUs per server; default: 1")
    add("--concurrency", type=int, default=256, help="requests under way; default: 256")
    add("--seed", type=int, default=42, help="of sampling and of the intervals; default: 42")
    add("--limit", type=int, help="only the first problems of each file")
    add(
        "--reward",
        metavar="PATH",
        help="file or pkg://module with another reward function; default: this package's",
    )
    add("--reward-name", default="compute_score", help="default: compute_score")
    add("--score-threads", type=int, default=8, help="default: 8")
    add("--score-only", action="store_true", help="score the completions that are there")
    add("--overwrite", action="store_true", help="remove the completions that are there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate, score and print the table; returns the exit code."""
    from rich.console import Console

    from capo_verl.data.evaluation import pipeline

    try:
        pipeline.run(args, Console(stderr=True))
    except (ValueError, OSError) as error:
        return refuse("evaluate", error)
    return 0
