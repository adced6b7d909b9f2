# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: accuracy, rejection rate and policy shift over completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_verl.cpu.quickstart.records import Record
from capo_verl.viewer.colours import BLUE, GREEN, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_MEASURED = "not measured in this run\n(+capo=track measures and filters nothing)"


def draw(records: Sequence[Record], completions_per_step: int, title: str) -> Figure:
    """Three panels over the number of completions; a panel whose metric was never logged says so.

    Args:
        records: the run, in order.
        completions_per_step: prompts per step times completions per prompt.
        title: headline.
    """
    from matplotlib.figure import Figure as NewFigure  # no pyplot: no global state, no display

    figure = NewFigure(figsize=(7.2, 7.6), layout="constrained")
    accuracy, rejection, shift = figure.subplots(3, 1, sharex=True, height_ratios=(1.6, 1, 1))
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")

    _plot(
        accuracy, records, "train_accuracy", completions_per_step,
        color=GREY, lw=1.0, alpha=0.8, label="training batch",
    )  # fmt: skip
    _plot(
        accuracy, records, "held_out_accuracy", completions_per_step,
        color=BLUE, lw=2.2, marker="o", ms=5, clip_on=False, zorder=3, label="held-out problems",
    )  # fmt: skip
    accuracy.set(ylabel="accuracy", ylim=(0, 1))
    if accuracy.lines:
        accuracy.legend(loc="lower right", frameon=False)

    if _plot(
        rejection, records, "rejection_rate", completions_per_step, scale=100, color=ORANGE, lw=1.6
    ):
        rejection.set_ylim(bottom=0, top=max(1.0, rejection.get_ylim()[1]))
    rejection.set(ylabel="rejected tokens (%)")

    if _plot(shift, records, "policy_shift", completions_per_step, color=GREEN, lw=1.6):
        # The first step of a warm-up has learning rate 0.
        shift.set_yscale("log", nonpositive="mask")
        _whole_decades(shift)
    shift.set(ylabel="policy shift $m_F$\n(mean, nats)", xlabel="completions")

    shift.set_xlim(left=0)
    shift.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    for panel in (accuracy, rejection, shift):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    return figure


def save(records: Sequence[Record], completions_per_step: int, title: str, path: Path) -> None:
    """Draw and write a PNG."""
    draw(records, completions_per_step, title).savefig(path, dpi=150)


def _whole_decades(panel: Axes) -> None:
    """Log axis from one power of ten to another, so that its ticks read at a glance."""
    import numpy as np

    drawn = [np.asarray(line.get_ydata(), dtype=float).tolist() for line in panel.lines]
    values = [value for line in drawn for value in line if value > 0]
    if values:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        panel.set_ylim(10.0**low, 10.0 ** max(high, low + 1))
        panel.yaxis.set_minor_formatter(lambda *_: "")


def _plot(
    panel: Axes,
    records: Sequence[Record],
    name: str,
    per_step: int,
    scale: float = 1,
    **style: Any,
) -> bool:
    points = [
        (r.step * per_step, getattr(r, name) * scale)
        for r in records
        if getattr(r, name) is not None
    ]
    if points:
        panel.plot(*zip(*points, strict=True), **style)
    elif not panel.lines:
        panel.text(
            0.5, 0.5, NOT_MEASURED, transform=panel.transAxes, ha="center", va="center", color=GREY
        )
        panel.set_yticks([])
    return bool(points)
