# SPDX-License-Identifier: Apache-2.0
"""Figures of the studies.

Accuracy curves with bands, final accuracy over the learning rate, sensitivity, and the scale that
was found.

Colours are Okabe and Ito's, which people with any colour vision tell apart; methods differ by
marker and dash as well.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from capo_verl.experiments.study.compare import interval, scores

CONTROL = "#000000"
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Colours of Okabe and Ito, with grey for their yellow, hard to see; black is the control's."""
FAMILIAR = ("capo", "capo adaptive", "kl_budget", "soft", "soft + kl_budget")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")


def style(number: int) -> dict[str, Any]:
    """Colour, marker and dash of the n-th method; 0 is the control."""
    if number == 0:
        return {"color": CONTROL, "marker": MARKERS[0], "linestyle": DASHES[0]}
    n, i = len(OKABE_ITO), number - 1
    return {
        "color": OKABE_ITO[i % n],
        "marker": MARKERS[1:][i % n],
        "linestyle": DASHES[i // n % len(DASHES)],
    }


def styles(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Styles of all methods of a study, the control first and black.

    Methods that several studies have look the same in each.
    """
    control = frame["control"].iloc[0]
    methods = [m for m in frame["method"].unique() if m != control]
    numbers = {m: FAMILIAR.index(m) + 1 for m in methods if m in FAMILIAR}
    free = (n for n in itertools.count(1) if n not in numbers.values())
    return {control: style(0), **{m: style(numbers.get(m) or next(free)) for m in methods}}


def over_learning_rate(frame: pd.DataFrame, path: Path) -> None:
    """Final accuracy over the learning rate, mean and 95 % interval, a panel per cell."""
    frame = scores(frame, "final").copy()
    frame["rest"] = [_rest(c) for c in frame["cell"]]
    look = styles(frame)
    figure, panels = _panels(list(frame["rest"].unique()), "learning rate", "final accuracy")
    for rest, ax in panels.items():
        rows = frame[frame["rest"] == rest]
        for method in look:
            mine = rows[rows["method"] == method]
            if not mine.empty:
                _points(ax, mine, "lr", "final", method, look[method])
        base = rows["base"].mean()
        ax.axhline(base, color="0.6", linewidth=1, linestyle=":", zorder=0)
        ax.annotate(
            "base",
            (1, base),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color="0.4",
            fontsize=8,
        )
        ax.set_xscale("log")
        ax.set_ylim(-0.02, 1.02)
    _save(figure, panels, path)


def learning_curves(
    frame: pd.DataFrame, curves: pd.DataFrame, rates: Sequence[float], path: Path
) -> None:
    """Held-out accuracy over completions, mean and range over seeds.

    Each cell and learning rate has a panel.
    """
    frame = frame[frame["lr"].isin(rates) & (frame["status"] == "finished")].copy()
    frame["panel"] = [
        f"{_rest(c)}, lr {lr:g}" if _rest(c) else f"lr {lr:g}"
        for c, lr in zip(frame["cell"], frame["lr"], strict=True)
    ]
    look = styles(frame)
    joined = curves.merge(frame[["run_id", "method", "panel", "seed"]], on="run_id")
    figure, panels = _panels(
        list(frame["panel"].unique()), "completions", "held-out accuracy", columns=len(rates)
    )
    for panel, ax in panels.items():
        for method in look:
            rows = joined[(joined["panel"] == panel) & (joined["method"] == method)]
            if rows.empty:
                continue
            by = rows.groupby("completions")["accuracy"]
            x = np.array(list(by.groups))
            quiet = {k: v for k, v in look[method].items() if k != "marker"}
            ax.plot(x, by.mean(), label=method, linewidth=1.6, **quiet)
            ax.fill_between(
                x, by.min(), by.max(), color=look[method]["color"], alpha=0.12, linewidth=0
            )
        ax.set_ylim(-0.02, 1.02)
    _save(figure, panels, path)


def sensitivity(frame: pd.DataFrame, path: Path) -> None:
    """Final accuracy over every dotted axis of a study, the control as a line.

    Several cells have a row of panels each.
    """
    frame = scores(frame, "final").copy()
    frame["rest"] = [
        ", ".join(x for x in (_rest(c), f"lr {lr:g}") if x)
        for c, lr in zip(frame["cell"], frame["lr"], strict=True)
    ]
    cells = [json.loads(c) for c in frame["cell"]]
    axes = sorted({k for c in cells for k in c if "." in k})
    rests = [
        r
        for r in frame["rest"].unique()
        if any(
            any(a in c for a in axes) for c, x in zip(cells, frame["rest"], strict=True) if x == r
        )
    ]
    titles = [f"{axis.split('.')[-1]}, {rest}" for rest in rests for axis in axes]
    figure, panels = _panels(
        titles, "", "final accuracy", columns=len(axes) if len(rests) > 1 else None
    )
    look = styles(frame)
    for (rest, axis), ax in zip(itertools.product(rests, axes), panels.values(), strict=True):
        here = frame["rest"] == rest
        at = [c.get(axis) if x else None for c, x in zip(cells, here, strict=True)]
        rows = frame[[a is not None for a in at]].copy()
        rows["value"] = [float(a) for a in at if a is not None]
        for method, mine in rows.groupby("method", sort=False):
            _points(ax, mine, "value", "final", str(method), look[str(method)])
        control = frame.loc[here & (frame["method"] == frame["control"]), "final"]
        if len(control):
            ax.axhline(
                control.mean(),
                color=CONTROL,
                linewidth=1,
                label=f"{frame['control'].iloc[0]} (control)",
            )
        ax.set_xscale("log")
        values = rows["value"].unique()
        if len(values) and max(values) < 100 * min(values):
            # So few decades have crowded labels between them.
            ax.set_xticks(sorted(values), [f"{v:g}" for v in sorted(values)])
            ax.minorticks_off()
        ax.set_xlabel(axis.removeprefix("capo."))
        ax.set_ylim(-0.02, 1.02)
    _save(figure, panels, path)


def scale_found(frame: pd.DataFrame, curves: pd.DataFrame, path: Path) -> None:
    """Learning rate times scale at the end of a run, over the learning rate asked for."""
    last = curves.sort_values("step").groupby("run_id").tail(3).groupby("run_id")["scale"].mean()
    frame = frame[frame["status"] == "finished"].merge(last.rename("last_scale"), on="run_id")
    frame = frame[frame.groupby("method")["last_scale"].transform("min") < 0.999].copy()
    frame["rest"] = [_rest(c) for c in frame["cell"]]
    frame["effective"] = frame["lr"] * frame["last_scale"]
    look = {method: style(i + 1) for i, method in enumerate(frame["method"].unique())}
    figure, panels = _panels(
        list(frame["rest"].unique()),
        "learning rate asked for",
        "learning rate in effect, at the end",
    )
    for rest, ax in panels.items():
        rows = frame[frame["rest"] == rest]
        for method in look:
            mine = rows[rows["method"] == method]
            if not mine.empty:
                _points(ax, mine, "lr", "effective", method, look[method])
        ends = np.array([frame["lr"].min(), frame["lr"].max()])
        ax.plot(ends, ends, color="0.6", linewidth=1, linestyle=":", zorder=0)
        ax.annotate("no control", ends[[1, 1]], color="0.4", fontsize=8, ha="right", va="top")
        ax.set_xscale("log")
        ax.set_yscale("log")
    _save(figure, panels, path)


def _points(ax: Any, rows: pd.DataFrame, x: str, y: str, label: str, look: dict[str, Any]) -> None:
    found = [(value, *interval(list(group[y]))) for value, group in rows.groupby(x)]
    at, mean, low, high = (np.array(v) for v in zip(*found, strict=True))
    ax.plot(at, mean, label=label, linewidth=1.6, markersize=5, **look)
    ax.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _panels(
    titles: Sequence[str], x: str, y: str, columns: int | None = None
) -> tuple[Any, dict[str, Any]]:
    from matplotlib.figure import Figure

    columns = min(columns or 3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(4.1 * columns, 3.3 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for i, ax in enumerate(grid):
        if i >= len(titles):
            ax.set_axis_off()
            continue
        ax.set_title(titles[i], fontsize=10)
        ax.set_xlabel(x)
        ax.set_ylabel(y if i % columns == 0 else "")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.5)
    return figure, dict(zip(titles, grid, strict=False))


def _save(figure: Any, panels: dict[str, Any], path: Path) -> None:
    """PNG, and SVG beside it; one legend for all panels."""
    handles: dict[str, Any] = {}
    for ax in panels.values():
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        # Inches of a handle and the longest label in this size.
        entry = 0.6 + 0.085 * max(map(len, handles))
        columns = max(1, min(len(handles), int(figure.get_figwidth() / entry)))
        # Room for the rows beyond the two that the height was made for.
        rows = -(-len(handles) // columns)
        figure.set_figheight(figure.get_figheight() + 0.22 * max(0, rows - 2))
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=9,
        )
    import matplotlib

    # Without these two, the same data would give another file every time.
    with matplotlib.rc_context({"svg.hashsalt": "capo", "svg.fonttype": "none"}):
        figure.savefig(path.with_suffix(".png"), dpi=130)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _rest(cell: str) -> str:
    return ", ".join(
        v if k == "task" else f"{k} {v}"
        for k, v in json.loads(cell).items()
        if k != "lr" and "." not in k
    )
