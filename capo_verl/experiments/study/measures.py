# SPDX-License-Identifier: Apache-2.0
"""Measures that summarise a run's curve. Every definition once, here."""

from __future__ import annotations

from collections.abc import Sequence

Curve = Sequence[dict[str, float]]

LAST = 3
"""The final accuracy is the mean of this many evaluations."""
COLLAPSE = 0.5
"""A run has collapsed if its final accuracy is below this share of its base policy's."""
AVERAGED = (
    "entropy", "kl", "rejection", "rejection_positive", "rejection_negative", "scale", "weight",
    "out_of_region", "ratio_deviation", "grad_norm", "reward", "length", "ended", "outside"
)  # fmt: skip
DEATH, LAST_ROLLOUTS = 0.1, 5
"""A run has died if the mean reward of its last so many rollouts is below this."""


def summarise(curve: Curve) -> dict[str, float | bool]:
    """The measures of a run.

    Args:
        curve: rows by increasing ``step``; the first is the base policy.

    Returns:
        ``base`` (accuracy before training), ``final`` (mean of the last :data:`LAST` evaluations),
        ``lowest``, ``highest``, ``collapsed``, ``area`` (mean accuracy over the run, by the
        trapezoid rule over completions), ``completions``, ``tokens``, ``accepted_tokens``,
        ``seconds``, ``final_entropy``, ``kl_max``, and the means over the run of :data:`AVERAGED`,
        as ``mean_NAME``.
    """
    after = list(curve[1:]) or list(curve)
    accuracy = [row["accuracy"] for row in after]
    last = after[-1]
    result: dict[str, float | bool] = {
        "base": curve[0]["accuracy"],
        "final": mean(accuracy[-LAST:]),
        "lowest": min(accuracy),
        "highest": max(accuracy),
        "area": area(curve),
        **{
            name: last[name]
            for name in ("completions", "tokens", "accepted_tokens", "seconds")
            if name in last
        },
    }
    result["collapsed"] = bool(result["final"] < COLLAPSE * result["base"])
    if "entropy" in last:
        result["final_entropy"] = last["entropy"]
    peaks = [row["kl_max"] for row in after if "kl_max" in row]
    if peaks:
        result["kl_max"] = max(peaks)
    for name in AVERAGED:
        values = [row[name] for row in after if row.get(name) is not None]
        if values:
            result[f"mean_{name}"] = mean(values)
    return result


def of_steps(steps: Curve) -> dict[str, float | bool]:
    """Measures of a run's optimizer steps; none without steps.

    Returns:
        ``dead``, ``last_NAME``, means over the last :data:`LAST_ROLLOUTS` rollouts, and
        ``seconds_per_step``.
    """
    if not steps:
        return {}
    last = [row for row in steps if row["rollout"] > steps[-1]["rollout"] - LAST_ROLLOUTS]
    found: dict[str, float | bool] = {
        f"last_{name}": mean([row[name] for row in last])
        for name in ("reward", "entropy", "outside", "ended", "kl")
        if all(name in row for row in last)
    }
    seconds = mean([row["seconds"] for row in steps])
    return {**found, "dead": found["last_reward"] < DEATH, "seconds_per_step": seconds}


def area(curve: Curve, over: str = "completions") -> float:
    """Mean accuracy along a curve: the area below it by the trapezoid rule, over its length."""
    rows = list(curve)
    width = rows[-1][over] - rows[0][over]
    if width <= 0:
        return rows[-1]["accuracy"]
    pairs = zip(rows[:-1], rows[1:], strict=True)
    return sum((b[over] - a[over]) * (a["accuracy"] + b["accuracy"]) / 2 for a, b in pairs) / width


def first_reached(curve: Curve, accuracy: float, over: str = "completions") -> float | None:
    """Point at which a curve first reaches an accuracy, interpolated between evaluations.

    Args:
        over: column to measure along: ``completions``, ``accepted_tokens``, ``seconds`` ...

    Returns:
        None if it never does.
    """
    before: dict[str, float] | None = None
    for row in curve:
        if row["accuracy"] >= accuracy:
            if before is None or row["accuracy"] == before["accuracy"]:
                return row[over]
            share = (accuracy - before["accuracy"]) / (row["accuracy"] - before["accuracy"])
            return before[over] + share * (row[over] - before[over])
        before = row
    return None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
