# SPDX-License-Identifier: Apache-2.0
"""One run: agreement, copy bandwidth, then every contender at every number of tokens."""

from __future__ import annotations

from collections.abc import Callable

from capo_verl.experiments.benchmark.agreement import check_agreement
from capo_verl.experiments.benchmark.batch import make_batch
from capo_verl.experiments.benchmark.contenders import (
    KINDS,
    NAIVE,
    NAIVE_REUSED,
    Contender,
    Kind,
    Stages,
    accept_all,
)
from capo_verl.experiments.benchmark.machine import copy_bandwidth, environment, free_bytes
from capo_verl.experiments.benchmark.measure import measure_seconds
from capo_verl.experiments.benchmark.memory import measure_memory
from capo_verl.experiments.benchmark.profiling import profile
from capo_verl.experiments.benchmark.results import Report, Result, traffic
from capo_verl.experiments.benchmark.workload import MOMENT_BYTES, Workload

WARM_UP_TOKENS = 1024
WARM_UP_STEPS = 2
SECONDS_PER_CELL = 6.0
NAIVE_SECONDS = 20.0
"""The formulation as published is left out where it would take longer.

Its time is linear in tokens.
"""
_GB = 1e9
_MARGIN = 1.2
"""Memory asked for over the tensors known beforehand.

It is for the rest of the work, and what other processes may take.
"""


def run(workload: Workload, repeats: int, say: Callable[[str], None]) -> Report:
    """Measure all contenders.

    The median needs few repetitions of what is slow: a size is left after ``SECONDS_PER_CELL`` for
    each contender.

    Args:
        repeats: repetitions of every cell, at most.
        say: told what is being done.

    Raises:
        DisagreementError: if the contenders give different numbers.
        ValueError: if not even the inputs of the smallest size fit into memory.
    """
    too_large = _too_large_inputs(workload)
    sizes = [n for n in workload.tokens if n not in too_large]
    say("comparing the contenders with each other")
    agreement = check_agreement(workload)
    say("measuring the copy bandwidth")
    bandwidth = copy_bandwidth(workload.device)

    say(f"drawing {sizes[-1]:,} tokens")
    batch = make_batch(workload, sizes[-1], seed=0)  # every size is a prefix of it
    report = Report(
        title=workload.title,
        environment=environment(workload.device),
        sizes={
            "preset": workload.name, "vocab_size": workload.vocab_size,
            "hidden_size": workload.hidden_size, "tp": workload.tp, "rows": workload.rows,
            "top_k": workload.top_k, "model_dtype": str(workload.model_dtype),
        },
        copy_bytes_per_second=bandwidth,
        agreement=agreement,
        traffic=[
            traffic(
                n, batch.part(slice(n)).distinct_rows, workload.rows, workload.top_k,
                workload.hidden_size, workload.model_dtype.itemsize, MOMENT_BYTES,
            )
            for n in sizes
        ],
        results=[],
    )  # fmt: skip
    missing = {kind.key: kind.missing(workload) for kind in KINDS}
    contenders = {kind.key: _warm(kind, workload) for kind in KINDS if not missing[kind.key]}
    for n in workload.tokens:
        say(f"measuring {n:,} tokens")
        stages: dict[str, Stages] = {}
        for kind in KINDS:
            skipped = (
                missing[kind.key]
                or too_large.get(n)
                or _too_large(kind.tensor_bytes(workload, n), workload.device)
                or _too_slow(kind, report, n)
            )
            if skipped:
                report.results.append(Result(kind.key, n, skipped=skipped))
            else:
                stages[kind.key] = contenders[kind.key].stages(batch.part(slice(n)))
        report.results.extend(_measure(stages, n, workload.device, repeats))
    return report


def profiles(workload: Workload, tokens: int) -> dict[str, str]:
    """Key of every contender that runs here -> where its time goes."""
    batch, texts = make_batch(workload, tokens, seed=3), {}
    for kind in KINDS:
        if not (
            kind.missing(workload)
            or _too_large(kind.tensor_bytes(workload, tokens), workload.device)
        ):
            texts[kind.key] = profile(workload.device, _warm(kind, workload).stages(batch))
    return texts


def _too_large_inputs(workload: Workload) -> dict[int, str]:
    """The sizes whose inputs do not fit -> why."""
    reasons = {n: _too_large(workload.input_bytes(n), workload.device) for n in workload.tokens}
    too_large = {n: f"inputs: {reason}" for n, reason in reasons.items() if reason}
    if len(too_large) == len(reasons):
        raise ValueError(f"--tokens {workload.tokens[0]}: {too_large[workload.tokens[0]]}")
    return too_large


def _warm(kind: Kind, workload: Workload) -> Contender:
    """Give the contenders moments and a step count, as in training.

    Before the first update P(g) = g, which is less work.
    """
    contender = kind.build(workload, accept_all(workload), workload.model_dtype)
    for seed in range(1, 1 + WARM_UP_STEPS):
        batch = make_batch(workload, min(WARM_UP_TOKENS, workload.tokens[-1]), seed)
        for call in contender.stages(batch).values():
            call()
    return contender


def _measure(stages: dict[str, Stages], tokens: int, device: str, repeats: int) -> list[Result]:
    """Measure the contenders in turns, in every repetition.

    A disturbance of the machine then disturbs all of them.
    """
    # Memory first: this also compiles and warms up.
    memory = {key: measure_memory(device, calls) for key, calls in stages.items()}
    turns = {(key, stage): call for key, calls in stages.items() for stage, call in calls.items()}
    seconds = measure_seconds(device, turns, repeats, SECONDS_PER_CELL * len(stages))
    return [
        Result(key, tokens, {stage: seconds[key, stage] for stage in calls}, memory[key])
        for key, calls in stages.items()
    ]


def _too_slow(kind: Kind, report: Report, tokens: int) -> str | None:
    smaller = report.measured(kind.key)
    if kind not in (NAIVE, NAIVE_REUSED) or not smaller:
        return None
    last = smaller[-1]
    seconds = (last.evaluate_seconds + last.update_seconds) * tokens / last.tokens
    return f"would take {seconds:.0f} s" if seconds > NAIVE_SECONDS else None


def _too_large(nbytes: int, device: str) -> str | None:
    needed, free = nbytes * _MARGIN, free_bytes(device)
    return f"needs {needed / _GB:.1f} GB, {free / _GB:.1f} GB free" if needed > free else None
