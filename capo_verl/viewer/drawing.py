# SPDX-License-Identifier: Apache-2.0
"""Pictures of runs: one of all panels, one of each; PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_verl.viewer.groups import Band, Group, band
from capo_verl.viewer.panels import AXES, Panel, require_drawable, shown_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that are distinguishable with every common form of colour blindness.

Without the yellow, which is hard to see on white.
"""
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
MARKERS = ("", "o", "s", "^", "D")
"""Markers by round of colours: seven groups have none, the next seven circles, …"""
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "capo", "font.size": 9}
"""Text stays text in the SVG: small, searchable; and the same runs give the same file."""
WIDTH, HEIGHT = 4.6, 2.7
OVERVIEW = "curves"


def save_figures(groups: Sequence[Group], axis: str, folder: Path) -> list[Path]:
    """Write ``curves.png`` and ``.svg`` with all panels, and each panel in files of its own.

    Args:
        axis: a key of :data:`~capo_verl.viewer.panels.AXES`.

    Raises:
        ValueError: if no panel has anything to draw.
    """
    from matplotlib import rc_context

    panels = require_drawable(run for group in groups for run in group.runs)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, chosen in [(OVERVIEW, panels), *((panel.key, [panel]) for panel in panels)]:
        figure = draw(groups, chosen, axis)
        with rc_context(STYLE):
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # it is laid out: not again for each file
            for suffix in ("png", "svg"):
                path = folder / f"{name}.{suffix}"
                figure.savefig(path, dpi=160, metadata={"Date": None} if suffix == "svg" else None)
                written.append(path)
    return written


def draw(groups: Sequence[Group], panels: Sequence[Panel], axis: str) -> Figure:
    """Panels in two columns; colours tell the groups apart, dashes the curves of a panel."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as NewFigure  # no pyplot: no global state, no display

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        width = WIDTH * columns + 0.3
        legend_columns, legend_rows = _legend_shape(groups, width)
        figure = NewFigure(
            figsize=(width, HEIGHT * rows + 0.3 + 0.2 * legend_rows), layout="constrained"
        )
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, place in zip(panels, axes, strict=False):
            _draw_panel(place, panel, groups, axis)
        for place in axes[len(panels) :]:
            place.remove()
        if len(groups) > 1 or len(groups[0].runs) > 1:
            _name_groups(figure, groups, legend_columns)
        else:
            figure.suptitle(
                groups[0].label, fontsize=10, fontweight="bold", x=0.01, ha="left", parse_math=False
            )
    return figure


def _draw_panel(place: Axes, panel: Panel, groups: Sequence[Group], axis: str) -> None:
    curves = panel.curves_of(run for group in groups for run in group.runs)
    for number, group in enumerate(groups):
        colour, marker = _style(number)
        for curve, dashes in zip(curves, DASHES, strict=False):
            found = band(panel, curve, group, axis)
            if not found.x:
                continue
            few = len(found.x) <= 12
            place.plot(
                found.x, found.mean, color=colour, linestyle=dashes, linewidth=1.5,
                marker=marker or ("." if few else None),
                markersize=4, markevery=1 if few else max(1, len(found.x) // 10),
            )  # fmt: skip
            if not few and (alone := _alone(found)):  # between gaps, with no line to a neighbour
                place.plot(*alone, color=colour, linestyle="none", marker=".", markersize=4)
            if len(group.runs) > 1:
                place.fill_between(
                    found.x, found.low, found.high, color=colour, alpha=0.15, linewidth=0
                )
    if panel.log:
        _readable_log_axis(place)
    else:
        low, high = panel.limits
        place.set_ylim(bottom=low, top=high)
        if low == 0 and place.get_ylim()[1] <= 0.06:  # nothing but zeros
            place.set_ylim(0, 1)
    place.set_title(
        _symbols(panel.title),
        fontsize=9.5,
        loc="left",
        fontweight="bold",
        pad=17 if len(curves) > 1 else None,
    )
    place.set_ylabel(panel.unit)
    place.set_xlabel(AXES[axis])
    place.xaxis.set_major_locator(_few_ticks())
    place.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    place.grid(alpha=0.25, linewidth=0.6)
    place.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        _name_curves(place, [curve.label for curve in curves])


def _alone(found: Band) -> list[list[float]]:
    """x and y of the points without a neighbour; empty if there are none."""
    there = [False, *(not math.isnan(y) for y in found.mean), False]
    points = [
        (x, y)
        for x, y, before, here, after in zip(
            found.x, found.mean, there, there[1:], there[2:], strict=False
        )
        if here and not before and not after
    ]
    return [list(column) for column in zip(*points, strict=True)]


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True)


def _readable_log_axis(place: Axes) -> None:
    """Ticks at powers of ten, and some between them where the values lie within less than two."""
    import numpy as np
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    drawn = [np.asarray(line.get_ydata(), dtype=float).tolist() for line in place.lines]
    values = [value for line in drawn for value in line if value > 0]
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    decades = math.log10(high) - math.log10(low)
    if decades < 1.5:  # before the scale, which would look for limits between equal values
        place.set_ylim(low / 1.3 if low < high else low / 3, high * 1.3 if low < high else high * 3)
    place.set_yscale("log")
    place.yaxis.set_minor_formatter(NullFormatter())
    if decades >= 1.5:
        place.yaxis.set_major_locator(LogLocator(numticks=7))
    else:
        # In a narrow range there need be no 1, 2 or 5.
        narrow = MaxNLocator(nbins=5) if decades < 0.5 else LogLocator(subs=(1, 2, 5))
        place.yaxis.set_major_locator(narrow)
        place.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _style(number: int) -> tuple[str, str]:
    return OKABE_ITO[number % len(OKABE_ITO)], MARKERS[number // len(OKABE_ITO) % len(MARKERS)]


def _legend_shape(groups: Sequence[Group], width: float) -> tuple[int, int]:
    """Columns and rows of the names, in a figure of this width in inches."""
    longest = max(len(group.label) for group in groups)
    columns = max(1, min(len(groups), int(width * 13 / (longest + 6))))
    return columns, math.ceil(len(groups) / columns)


def _name_groups(figure: Figure, groups: Sequence[Group], columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for number in range(len(groups)):
        colour, marker = _style(number)
        handles.append(
            Line2D([], [], color=colour, marker=marker or None, markersize=4, linewidth=2)
        )
    legend = figure.legend(
        handles, ["?"] * len(groups), loc="outside upper left", ncols=columns, frameon=False,
        fontsize=9,
    )  # fmt: skip
    for text, group in zip(legend.get_texts(), groups, strict=True):
        text.set_parse_math(False)  # a name is no formula, and may begin with _
        text.set_text(group.label if shown_panels(group.runs) else f"{group.label} (no numbers)")


def _name_curves(place: Axes, labels: Iterable[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color="#555555", linestyle=dashes, linewidth=1.3, label=_symbols(label))
        for label, dashes in zip(labels, DASHES, strict=False)
    ]
    # Between title and axes, where no curve runs.
    place.legend(
        handles=handles, frameon=False, fontsize=7.5, handlelength=2.6, ncols=len(handles),
        columnspacing=1.2, handletextpad=0.5,
        loc="lower left", bbox_to_anchor=(-0.02, 0.985), borderaxespad=0, borderpad=0.1,
    )  # fmt: skip


def _symbols(text: str) -> str:
    return text.replace("m_F", "$m_F$").replace("m_H", "$m_H$").replace("τ_F", "$\\tau_F$")


__all__ = ["OKABE_ITO", "Band", "draw", "save_figures"]
