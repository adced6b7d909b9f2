# SPDX-License-Identifier: Apache-2.0
"""The reward of every completion, and per problem what the statistics need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from capo_verl.data.evaluation.completions import Completion
from capo_verl.data.evaluation.estimates import majority, pass_at_k, powers_of_two
from capo_verl.data.evaluation.problems import Problem

Reward = Callable[..., Any]
Scored = dict[str, Any]


def score_all(
    problems: Sequence[Problem],
    completions: Mapping[tuple[str, int], Completion],
    reward: Reward,
    threads: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Scored]:
    """One record per completion, in the order of problems and samples.

    The reward is called in threads, as verl does.

    Args:
        reward: in the signature of verl's ``custom_reward_function``; a number or a dictionary with
            ``score``.
        advance: called after each.
    """
    chosen = [(p, c) for p in problems for (key, _), c in _of(completions, p.key)]
    records: list[Scored | None] = [None] * len(chosen)
    with ThreadPoolExecutor(threads) as pool:
        futures = {
            pool.submit(_score, reward, problem, completion): i
            for i, (problem, completion) in enumerate(chosen)
        }
        for future in as_completed(futures):
            records[futures[future]] = future.result()
            advance()
    return [record for record in records if record is not None]


def _of(
    completions: Mapping[tuple[str, int], Completion], key: str
) -> list[tuple[tuple[str, int], Completion]]:
    samples: list[tuple[tuple[str, int], Completion]] = []
    while (key, len(samples)) in completions:
        samples.append(((key, len(samples)), completions[key, len(samples)]))
    return samples


def _score(reward: Reward, problem: Problem, completion: Completion) -> Scored:
    result = reward(
        data_source=problem.data_source,
        solution_str=completion.response,
        ground_truth=problem.ground_truth,
        extra_info=dict(problem.extra_info),
    )
    values = result if isinstance(result, Mapping) else {"score": float(result)}
    return {
        "key": problem.key,
        "data_source": problem.data_source,
        "prompt": problem.prompt,
        "ground_truth": problem.ground_truth,
        "sample": completion.sample,
        "response": completion.response,
        "tokens": completion.tokens,
        "truncated": completion.truncated,
        **values,
        "acc": float(values.get("acc", values["score"])),
    }


def per_problem(
    scored: Sequence[Scored], ks: Sequence[int] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Data source to metric to one value per problem.

    Metrics: ``avg@n`` (accuracy), ``score`` (mean reward), ``pass@k``, ``maj@n`` where the reward
        reports ``pred``, and the
    shares ``answered``, ``judge_failed`` and ``truncated``, and ``tokens``.

    Raises:
        ValueError: if the problems of a source have different numbers of samples, or fewer than
            some k.
    """
    problems: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for record in scored:
        problems[record["data_source"], record["key"]].append(record)
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    counts = {len(records) for records in problems.values()}
    if len(counts) > 1:
        raise ValueError(
            f"problems have {min(counts)} to {max(counts)} completions; complete the run without "
            "--score-only first"
        )
    for (source, _), records in problems.items():
        n = len(records)
        accuracies = [record["acc"] for record in records]
        correct = sum(accuracy >= 1.0 for accuracy in accuracies)
        metrics = groups[source]
        metrics[f"avg@{n}"].append(sum(accuracies) / n)
        for k in ks or powers_of_two(n):
            metrics[f"pass@{k}"].append(pass_at_k(n, correct, k))
        if n > 1 and all("pred" in record for record in records):
            metrics[f"maj@{n}"].append(majority([record["pred"] for record in records], accuracies))
        for name in ("score", "answered", "judge_failed", "truncated", "tokens"):
            if all(name in record for record in records):
                metrics[name].append(sum(float(record[name]) for record in records) / n)
    return {source: dict(metrics) for source, metrics in groups.items()}
