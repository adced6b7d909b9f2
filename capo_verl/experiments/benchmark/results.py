# SPDX-License-Identifier: Apache-2.0
"""The measured numbers, what follows from them, and both as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capo_verl.experiments.benchmark.memory import Usage, scratch

FORMAT = 2


@dataclass(frozen=True)
class Traffic:
    """Bytes that must move for a number of tokens, whoever computes."""

    tokens: int
    distinct_rows: int
    """U, rows that are in some support."""
    evaluate: int
    """Logits once, hidden states once, both moments of the row of every support entry."""
    evaluate_rows_once: int
    """The same with both moments of each distinct row read once, as a perfect cache would."""
    update: int
    """Hidden state of every support entry, and both moments of each distinct row, twice.

    The moments are read and written.
    """


def traffic(
    tokens: int,
    distinct_rows: int,
    rows: int,
    top_k: int,
    hidden_size: int,
    model_bytes: int,
    moment_bytes: int,
) -> Traffic:
    """Bytes that must move, with the sizes of the model's and of the moments' elements.

    ``model_bytes`` is that of the logits and hidden states, ``moment_bytes`` that of the moments.
    """
    streams = tokens * (rows + hidden_size) * model_bytes
    both_moments = 2 * hidden_size * moment_bytes
    return Traffic(
        tokens=tokens,
        distinct_rows=distinct_rows,
        evaluate=streams + tokens * top_k * both_moments,
        evaluate_rows_once=streams + distinct_rows * both_moments,
        update=tokens * top_k * hidden_size * model_bytes + distinct_rows * 2 * both_moments,
    )


@dataclass(frozen=True)
class Result:
    """One contender at one number of tokens."""

    contender: str
    tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Stage -> every repetition.

    The first stage is ``evaluate``; those that begin with this name are its other batches.
    """
    memory: dict[str, Usage] = field(default_factory=dict)
    """Stage -> bytes beside moments and inputs."""
    skipped: str = ""
    """Reason that nothing was measured."""

    @property
    def evaluate_seconds(self) -> float:
        return self._median(evaluate=True)

    @property
    def update_seconds(self) -> float:
        """All other stages: accumulate and update."""
        return self._median(evaluate=False)

    @property
    def extra_bytes(self) -> int:
        """The most allocated at any time of evaluate and update."""
        return max(usage.peak for usage in self.memory.values())

    @property
    def held_bytes(self) -> int:
        """Bytes that evaluate leaves allocated until the update."""
        return max(usage.held for stage, usage in self.memory.items() if _is_evaluate(stage))

    @property
    def evaluate_scratch_bytes(self) -> int:
        """The most that evaluate needs temporarily."""
        return self._scratch(evaluate=True)

    @property
    def update_scratch_bytes(self) -> int:
        """The most that accumulate and update need temporarily."""
        return self._scratch(evaluate=False)

    def _median(self, evaluate: bool) -> float:
        """Median over the repetitions of the seconds of all stages of a kind."""
        stages = (
            samples for stage, samples in self.seconds.items() if _is_evaluate(stage) == evaluate
        )
        return statistics.median(math.fsum(one) for one in zip(*stages, strict=True))

    def _scratch(self, evaluate: bool) -> int:
        before, most = 0, 0
        for stage, usage in self.memory.items():
            if _is_evaluate(stage) == evaluate:
                most = max(most, scratch(before, usage))
            before = usage.held
        return most


@dataclass(frozen=True)
class Growth:
    """Exponent of tokens in the time: slope of log seconds over log tokens."""

    largest: float
    """Exponent between the two largest sizes."""
    overall: float
    """Least squares over all sizes."""


@dataclass(frozen=True)
class Report:
    """One run."""

    title: str
    environment: dict[str, str | int]
    sizes: dict[str, Any]
    """Preset, vocabulary, hidden size, top_k, ..."""
    copy_bytes_per_second: float
    agreement: dict[str, float]
    """Quantity compared between contenders -> largest deviation."""
    traffic: list[Traffic]
    results: list[Result]

    def result(self, contender: str, tokens: int) -> Result | None:
        """Result of a contender at a number of tokens; None if it was not measured."""
        found = (
            r
            for r in self.results
            if (r.contender, r.tokens) == (contender, tokens) and not r.skipped
        )
        return next(found, None)

    def traffic_of(self, tokens: int) -> Traffic:
        return next(t for t in self.traffic if t.tokens == tokens)

    def measured(self, contender: str) -> list[Result]:
        """Results of a contender in ascending number of tokens."""
        return sorted(
            (r for r in self.results if r.contender == contender and not r.skipped),
            key=lambda r: r.tokens,
        )

    def bandwidth(self, result: Result) -> dict[str, float]:
        """Effective bytes per second: the bytes that must move over the time taken."""
        t = self.traffic_of(result.tokens)
        return {
            "evaluate": t.evaluate / result.evaluate_seconds,
            "evaluate_rows_once": t.evaluate_rows_once / result.evaluate_seconds,
            "update": t.update / result.update_seconds,
        }

    def speedup(self, result: Result, over: str = "naive") -> float | None:
        """Time of another contender's evaluate over this one's; None if it was not measured."""
        other = self.result(over, result.tokens)
        return None if other is None else other.evaluate_seconds / result.evaluate_seconds

    def memory_ratio(self, result: Result) -> float | None:
        """Extra memory over that of the formulation as published; None if not measured."""
        naive = self.result("naive", result.tokens)
        return None if naive is None else result.extra_bytes / naive.extra_bytes

    def growth(self, contender: str, stage: str) -> Growth | None:
        """Growth of ``evaluate`` or ``update``; None if fewer than two sizes were measured."""
        points = [(r.tokens, getattr(r, f"{stage}_seconds")) for r in self.measured(contender)]
        return Growth(_slope(points[-2:]), _slope(points)) if len(points) > 1 else None

    def derived(self) -> list[dict[str, Any]]:
        """The columns of the table, in plain units, one dict per measured cell."""
        rows = []
        for r in self.results:
            if r.skipped:
                continue
            rows.append(
                {
                    "contender": r.contender,
                    "tokens": r.tokens,
                    "evaluate_s": r.evaluate_seconds,
                    "update_s": r.update_seconds,
                    "extra_bytes": r.extra_bytes,
                    "held_bytes": r.held_bytes,
                    "evaluate_scratch_bytes": r.evaluate_scratch_bytes,
                    "update_scratch_bytes": r.update_scratch_bytes,
                    **{f"{stage}_bytes_per_s": value for stage, value in self.bandwidth(r).items()},
                    "evaluate_speedup_over_naive": self.speedup(r),
                    "evaluate_speedup_over_naive_reused": self.speedup(r, over="naive_reused"),
                    "extra_memory_over_naive": self.memory_ratio(r),
                }
            )
        return rows

    def save(self, path: Path) -> None:
        """JSON: the measured numbers, and under ``derived`` what follows from them."""
        content = {"format": FORMAT, **asdict(self), "derived": self.derived()}
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is of another format.
        """
        content = json.loads(path.read_text())
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: not a benchmark report of format {FORMAT}")
        del content["derived"]
        content["traffic"] = [Traffic(**t) for t in content["traffic"]]
        content["results"] = [
            Result(
                **{**r, "memory": {stage: Usage(**usage) for stage, usage in r["memory"].items()}}
            )
            for r in content["results"]
        ]
        return cls(**content)


def _is_evaluate(stage: str) -> bool:
    return stage.startswith("evaluate")


def _slope(points: Sequence[tuple[int, float]]) -> float:
    return statistics.linear_regression(
        *zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    ).slope
