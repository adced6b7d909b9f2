# SPDX-License-Identifier: Apache-2.0
"""An evaluation from start to end: a checkpoint and data files become a table of accuracies."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from capo_verl.data.evaluation import generation, scoring
from capo_verl.data.evaluation.completions import Completion, Store
from capo_verl.data.evaluation.estimates import LEVEL, RESAMPLES, Estimate, estimates
from capo_verl.data.evaluation.model_folder import find_model
from capo_verl.data.evaluation.problems import Problem, read_problems

RESULTS = "results.json"
SCORED = "scored.parquet"


def run(args: argparse.Namespace, console: Console) -> None:
    """Evaluate a checkpoint, write its results, and print their table.

    Raises:
        ValueError, OSError: whatever is wrong with the input, in one sentence, before a server is
            started.
    """
    output = Path(args.output)
    _check(args)
    problems = read_problems(args.data, args.limit)
    reward = load_reward(args.reward, args.reward_name)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        store = (
            Store(output, None) if args.score_only else _generate(args, output, problems, progress)
        )
        completions = store.read()
        store.close()
        n = args.n if not args.score_only else int(store.settings["n"])
        missing = [p for p in problems if (p.key, n - 1) not in completions]
        if missing:
            raise ValueError(
                f"{store.path} lacks completions of {len(missing)} of {len(problems)} problems; "
                "run without --score-only"
            )
        bar = progress.add_task("scoring", total=n * len(problems))
        scored = scoring.score_all(
            problems, completions, reward, args.score_threads, lambda: progress.advance(bar)
        )
    groups = scoring.per_problem(scored, args.k)
    results = estimates(groups, args.seed)
    _write(output, store.settings, args, groups, results, scored)
    print(table(groups, results))
    print(f"results: {output / RESULTS}; completions with scores: {output / SCORED}")


def _check(args: argparse.Namespace) -> None:
    if args.n < 1:
        raise ValueError(f"-n {args.n}: at least one completion per problem is needed")
    if args.temperature == 0 and args.n > 1:
        raise ValueError(
            f"--temperature 0 with -n {args.n}: all completions of a problem would be the same; -n "
            "1"
        )
    if args.k and max(args.k) > args.n and not args.score_only:
        raise ValueError(f"--k {max(args.k)}: pass@k needs at least k completions, -n is {args.n}")
    if args.score_only and args.overwrite:
        raise ValueError("--score-only scores what is there, --overwrite removes it: choose one")
    if not args.score_only and not args.model:
        raise ValueError("--model is missing")


def _generate(
    args: argparse.Namespace, output: Path, problems: list[Problem], progress: Progress
) -> Store:
    model = find_model(args.model)
    cpu = os.environ.get("VERL_PLATFORM") == "cpu"
    backend = args.backend or ("hf" if cpu else "vllm")
    if (backend == "hf") != cpu:
        raise ValueError(
            f"--backend {backend}: hf is the server for VERL_PLATFORM=cpu, vllm and sglang are "
            "those for GPUs"
        )
    server = generation.ServerConfig(
        model=model, backend=backend, gpus_per_node=_gpus(args.gpus, cpu, args.tp),
        nodes=args.nodes, tensor_parallel=args.tp,
        max_prompt_length=args.max_prompt_length, max_response_length=args.max_response_length,
        seed=args.seed, overrides=tuple(args.overrides),
    )  # fmt: skip
    generation.compose_config(server)  # refuses wrong overrides now
    tokenizer = generation.load_tokenizer(model)
    prompts = generation.tokenize(problems, tokenizer, args.max_prompt_length)
    if args.overwrite and output.exists():
        _remove(output)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    settings = {
        "model": str(Path(model).resolve()) if Path(model).exists() else model, "backend": backend,
        "n": args.n, **sampling, "max_response_length": args.max_response_length, "seed": args.seed,
        "overrides": list(args.overrides),
    }  # fmt: skip
    store = Store(output, settings)
    there = store.read()
    # One sample of every problem after the other, so that the first estimate is there early.
    tasks = [
        (p, i, prompts[p.key]) for i in range(args.n) for p in problems if (p.key, i) not in there
    ]
    bar = progress.add_task(
        "generating", total=args.n * len(problems), completed=args.n * len(problems) - len(tasks)
    )
    if tasks:
        # A server counts from its start how often a prompt was asked: with its first seed it would
        # repeat what is there.
        config = generation.compose_config(_with_seed(server, args.seed + len(there)))

        def receive(completion: Completion) -> None:
            store.add([completion])
            progress.advance(bar)

        generation.generate(config, tasks, sampling, tokenizer, args.concurrency, receive)
    return store


def _with_seed(server: generation.ServerConfig, seed: int) -> generation.ServerConfig:
    return generation.ServerConfig(**{**asdict(server), "seed": seed})


def _gpus(asked: int | None, cpu: bool, tensor_parallel: int) -> int:
    if asked is not None:
        return asked
    if cpu:
        return tensor_parallel
    import torch

    return torch.cuda.device_count()


def _remove(output: Path) -> None:
    """Remove an earlier evaluation, and nothing that is not one."""
    known = {"settings.json", "completions.jsonl", RESULTS, SCORED}
    foreign = sorted(path.name for path in output.iterdir() if path.name not in known)
    if foreign:
        raise ValueError(
            f"--overwrite: {output} holds more than an evaluation ({foreign[0]}); choose another "
            "--output"
        )
    shutil.rmtree(output)


def load_reward(path: str | None, name: str) -> scoring.Reward:
    """The reward function: this package's, or one from a file or ``pkg://module``, as in verl.

    Raises:
        ValueError: if it cannot be loaded.
    """
    if path is None:
        from capo_verl.data.rewards.math_answers import compute_score

        return compute_score
    from verl.utils.import_utils import load_extern_object

    try:
        function = load_extern_object(module_path=path, object_name=name)
    except (ImportError, FileNotFoundError, AttributeError, RuntimeError) as error:
        raise ValueError(f"--reward {path} --reward-name {name}: {error}") from error
    if not callable(function):
        raise ValueError(f"--reward {path}: {name} is not a function")
    return function


def table(
    groups: dict[str, dict[str, list[float]]], results: dict[str, dict[str, Estimate]]
) -> str:
    """One line per data source: problems, accuracies and passes with intervals, in per cent."""
    shown = [
        m
        for m in next(iter(results.values()))
        if m.startswith(("avg@", "pass@", "maj@")) and m != "pass@1"
    ]
    rows = [["data source", "problems", *shown]]
    for group, metrics in results.items():
        count = str(len(next(iter(groups[group].values())))) if group in groups else ""
        rows.append([group, count, *(_cell(metrics[m]) if m in metrics else "-" for m in shown)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cell(estimate: Estimate) -> str:
    mean = f"{100 * estimate.mean:.1f}"
    if estimate.low is None or estimate.high is None:
        return mean
    return f"{mean} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _write(
    output: Path,
    settings: Mapping[str, Any],
    args: argparse.Namespace,
    groups: dict[str, dict[str, list[float]]],
    results: dict[str, dict[str, Estimate]],
    scored: list[dict[str, Any]],
) -> None:
    from capo_verl.data.prepare import write_json, write_parquet

    write_parquet(scored, output / SCORED)
    report = {
        "settings": {
            **settings,
            "data": args.data,
            "reward": args.reward or "capo_verl.data.rewards.math_answers",
        },
        "problems": {group: len(next(iter(metrics.values()))) for group, metrics in groups.items()},
        "interval": f"{LEVEL:.0%} bootstrap over problems, {RESAMPLES} resamples",
        "results": {
            group: {m: asdict(e) for m, e in metrics.items()} for group, metrics in results.items()
        },
    }
    write_json(report, output / RESULTS)
