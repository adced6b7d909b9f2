# SPDX-License-Identifier: Apache-2.0
"""Panels and their metrics: the one table behind the figures and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from capo_verl.viewer.derived import (
    ACCEPTED,
    ACCURACY,
    COMPLETIONS,
    REWARD,
    THRESHOLD,
    is_source,
)
from capo_verl.viewer.notes import spans
from capo_verl.viewer.series import LARGEST, Run, Series

NO_NUMBER = f"NaN, infinite or beyond {LARGEST:g}"
MOST_NAMES = 8


@dataclass(frozen=True)
class Curve:
    """One line of a run in a panel."""

    metric: str
    label: str = ""
    """Name among the panel's other lines."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    key: str
    """Name in files and in elements of the page."""
    title: str
    unit: str
    curves: tuple[Curve, ...]
    factor: float = 1.0
    log: bool = False
    """Logarithmic: values <= 0 are left out."""
    limits: tuple[float | None, float | None] = (None, None)

    def series(self, run: Run, curve: Curve) -> Series:
        """Values of a curve in the panel's unit, NaN for a gap; empty if the run has none."""
        found = run.series.get(curve.metric, Series())
        kept = [
            (s, v * self.factor)
            for s, v in zip(found.steps, found.values, strict=True)
            if not self.log or math.isnan(v) or v > 0
        ]
        return Series([s for s, _ in kept], [v for _, v in kept])

    def curves_of(self, runs: Iterable[Run]) -> list[Curve]:
        """Curves for which at least one of the runs has a value that can be drawn."""
        runs = list(runs)
        return [
            curve for curve in self.curves if any(self.series(run, curve).known() for run in runs)
        ]


_SIGNS = (
    Curve("capo/rejection_rate", "all"),
    Curve("capo/rejection_rate_positive_advantage", "A > 0"),
    Curve("capo/rejection_rate_negative_advantage", "A < 0"),
)

PANELS = (
    Panel("accuracy", "Held-out accuracy", "accuracy", (Curve(ACCURACY),)),
    Panel("reward", "Training reward", "mean reward", (Curve(REWARD),)),
    Panel("rejection", "Rejected tokens", "% of tokens", _SIGNS, factor=100.0, limits=(0.0, None)),
    Panel(
        "weight", "Mean weight of a token", "weight", (Curve("capo/weight_mean"),),
        limits=(0.0, 1.05),
    ),
    Panel(
        "policy_shift", "Policy shift m_F of a token", "nats",
        (
            Curve("capo/policy_shift_p50", "median"),
            Curve("capo/policy_shift_p99", "99th percentile"),
            Curve("capo/policy_shift_max", "largest"),
            Curve(THRESHOLD, "threshold τ_F"),
        ),
        log=True,
    ),
    Panel(
        "objective_shift", "Objective shift m_H of a token", "units of the advantage",
        (
            Curve("capo/objective_shift_p50", "median"),
            Curve("capo/objective_shift_p99", "99th percentile"),
            Curve("capo/objective_shift_p01", "1st percentile"),
        ),
    ),
    Panel(
        "batch_policy_shift", "Policy shift m_F of the batch", "nats",
        (
            Curve("capo/batch_policy_shift_before", "all tokens"),
            Curve("capo/batch_policy_shift_after", "accepted tokens"),
        ),
        log=True,
    ),
    Panel(
        "batch_objective_shift", "Objective shift m_H of the batch", "units of the advantage",
        (
            Curve("capo/batch_objective_shift_before", "all tokens"),
            Curve("capo/batch_objective_shift_after", "accepted tokens"),
        ),
    ),
    Panel(
        "kl", "Measured KL(old‖new) of a step", "nats per token",
        (
            Curve("capo/kl_mean", "mean"), Curve("capo/kl_p99", "99th percentile"),
            Curve("capo/kl_delta", "budget"), Curve("capo/kl_floor", "floor"),
        ),
        log=True,
    ),
    Panel(
        "rate", "Learning rate", "",
        (Curve("capo/lr", "of the KL budget"), Curve("actor/lr", "scheduled")), log=True,
    ),
    Panel(
        "entropy", "Entropy of the policy", "nats per token", (Curve("actor/entropy"),),
        limits=(0.0, None),
    ),
    Panel(
        "length", "Length of a response", "tokens", (Curve("response_length/mean"),),
        limits=(0.0, None),
    ),
    Panel(
        "grad_norm", "Gradient norm, before clipping", "norm", (Curve("actor/grad_norm"),),
        log=True,
    ),
)  # fmt: skip

AXES = {"steps": "training step", "completions": "completions", "accepted": "accepted tokens"}
"""Choices of the x axis."""
_AXIS_SERIES = {"completions": COMPLETIONS, "accepted": ACCEPTED}


def axis_values(run: Run, axis: str) -> dict[int, float] | None:
    """Step -> position on the x axis; None if the run does not have it.

    ``steps`` needs nothing: it is the step itself.
    """
    if axis == "steps":
        return {step: float(step) for series in run.series.values() for step in series.steps}
    series = run.series.get(_AXIS_SERIES[axis])
    return None if series is None else series.known()


def choose_axis(runs: Iterable[Run], wanted: str | None = None) -> str:
    """The wanted x axis, or completions where every run has them, else steps.

    Raises:
        ValueError: if a run does not have the wanted one.
    """
    runs = list(runs)
    if wanted is None:
        return "completions" if all(axis_values(run, "completions") for run in runs) else "steps"
    without = [run.name for run in runs if axis_values(run, wanted) is None]
    if without:
        raise ValueError(
            f"--x {wanted}: unknown for {', '.join(without)} (no configuration beside its log, nor "
            "perf/total_num_tokens and lengths in it); use --x steps"
        )
    return wanted


def shown_panels(runs: Iterable[Run]) -> list[Panel]:
    """Panels for which there is something to draw."""
    runs = list(runs)
    return [panel for panel in PANELS if panel.curves_of(runs)]


def require_drawable(runs: Iterable[Run]) -> list[Panel]:
    """:func:`shown_panels`, of which there is one at least.

    Raises:
        ValueError: if there is none, with what the runs' notes say.
    """
    runs = list(runs)
    panels = shown_panels(runs)
    if not panels:
        notes = [note for run in runs for note in run.notes]
        raise ValueError(
            "; ".join(
                [
                    "nothing to draw: none of the runs has a metric that is drawn (docs/viewer.md "
                    "lists them)",
                    *notes,
                ]
            )
        )
    return panels


def gap_notes(run: Run) -> list[str]:
    """Sentences about the logged values that cannot be drawn, for metrics that would be."""
    drawn = {curve.metric for panel in PANELS for curve in panel.curves}
    logged = {
        name: series for name, series in run.series.items() if name in drawn or is_source(name)
    }
    where = f"{run.source}, {run.part}" if run.part else str(run.source)
    if logged and not any(series.known() for series in logged.values()):
        return [f"{where}: every value of {_names(logged)} is {NO_NUMBER}; none is drawn"]
    together: dict[tuple[int, ...], list[str]] = {}
    for name, series in logged.items():
        together.setdefault(tuple(series.gaps()), []).append(name)
    together.pop((), None)
    return [
        f"{where}: {_names(names)}: {NO_NUMBER} at step{'s' if len(gaps) > 1 else ''} "
        f"{spans(gaps)}; a gap in the line"
        for gaps, names in together.items()
    ]


def _names(metrics: Iterable[str]) -> str:
    first, rest = list(metrics)[:MOST_NAMES], list(metrics)[MOST_NAMES:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")
