# SPDX-License-Identifier: Apache-2.0
"""Pictures of a calibration: predicted against true KL, rank correlation per predictor, ratio over
the depth trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from capo_verl.commands.calibrate.policy import DEPTHS
from capo_verl.commands.calibrate.predictors import LABELS, PREDICTIONS
from capo_verl.viewer.colours import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

DECADES = 12
"""Shown at most, below the largest: what lies lower is rounding."""
STYLES = [
    (BLUE, "o"), (ORANGE, "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"),
    ("#E69F00", "P"), (GREY, "X"), ("#000000", "*"),
]  # fmt: skip
"""Okabe-Ito colours, each with a marker of its own."""
DEPTH_LABELS = {
    "head": "LM head",
    "last_layer": "+ last layer",
    "last_half": "+ upper half",
    "all": "all",
}


def draw(tokens: pd.DataFrame, table: pd.DataFrame, title: str) -> Figure:
    """Three panels for one source of measurements.

    Args:
        tokens: columns ``policy_shift, kl``.
        table: of :func:`capo_verl.commands.calibrate.tables.aggregate` by depth, target and
            predictor.
        title: headline.
    """
    figure = new_figure(title, (12.6, 4.3))
    cloud, bars, depth = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    calibration_panel(cloud, tokens["policy_shift"].to_numpy(), tokens["kl"].to_numpy())
    kl = table[table["target"] == "kl"]
    bars_panel(bars, kl[kl["depth"] == "all"], "spearman", "Spearman with the true token KL")
    depth_panel(depth, {"": kl})
    return figure


def new_figure(title: str, size: tuple[float, float]) -> Figure:
    """An empty figure with a headline on the left."""
    from matplotlib.figure import Figure as NewFigure  # no pyplot: no global state, no display

    figure = NewFigure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write ``STEM.png`` and ``STEM.svg``; the same figure gives the same SVG."""
    import matplotlib

    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": "capo", "svg.fonttype": "none"}):
        figure.savefig(paths[0], dpi=140)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def calibration_panel(
    panel: Axes, predicted: np.ndarray, true: np.ndarray, label: str = LABELS["policy_shift"]
) -> None:
    """Density of the tokens over log predicted and log true, the line on which they are equal, and
    the median of the true in equally filled bins of the predicted, with its 10 % and 90 %
    quantiles.
    """
    both = (predicted > 0) & (true > 0)
    if both.sum() < 2:
        _nothing(panel, "no token with a prediction and a KL above 0")
        return
    x, y = np.log10(predicted[both]), np.log10(true[both])
    inside = (x > x.max() - DECADES) & (y > y.max() - DECADES)
    x, y = x[inside], y[inside]
    panel.hexbin(
        x, y, gridsize=38, bins="log", cmap="Greys", mincnt=1, linewidths=0.1, rasterized=True
    )
    # A handful of tokens with next to no prediction would squeeze all others into a corner.
    limits = [(float(np.quantile(v, 0.003)) - 0.5, float(v.max()) + 0.5) for v in (x, y)]
    low, high = min(v[0] for v in limits), max(v[1] for v in limits)
    panel.plot([low, high], [low, high], color=ORANGE, lw=1.4, label="true = predicted")
    edges = np.quantile(x, np.linspace(0, 1, min(16, max(2, len(x) // 20)) + 1))
    bins = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    used = [b for b in range(len(edges) - 1) if (bins == b).sum() >= 3]
    middle = [float(np.median(x[bins == b])) for b in used]
    if used:
        lower, median, upper = np.array(
            [np.quantile(y[bins == b], (0.1, 0.5, 0.9)) for b in used]
        ).T
        panel.fill_between(middle, lower, upper, color=BLUE, alpha=0.2, lw=0)
        panel.plot(middle, median, color=BLUE, lw=2, marker="o", ms=3.5, label="median, 10–90 %")
    ratio = float(10 ** np.median(y - x))
    panel.set(xlabel=f"predicted {label} (nats)", ylabel="true token KL (nats)")
    panel.set_title(f"median of true / predicted: {_short(ratio)}", fontsize=9, loc="left")
    panel.set(xlim=limits[0], ylim=limits[1])
    for axis, (start, end) in zip((panel.xaxis, panel.yaxis), limits, strict=True):
        axis.set_major_formatter(
            lambda value, _: f"$10^{{{value:.0f}}}$" if float(value).is_integer() else ""
        )
        axis.set_major_locator(_whole(int(max(1, (end - start) // 4))))
    panel.legend(frameon=False, fontsize=8, loc="best")
    _clean(panel)


def bars_panel(panel: Axes, table: pd.DataFrame, statistic: str, label: str) -> None:
    """One bar per predictor with its interval; CAPO's own predictions are blue, what they have to
    beat is grey.
    """
    order = [name for name in LABELS if name in set(table["predictor"])][::-1]
    chosen = table.set_index("predictor").loc[order]
    colors = [BLUE if name in PREDICTIONS else GREY for name in order]
    panel.barh(range(len(order)), chosen[statistic], color=colors, height=0.68)
    low, high = (chosen[f"{statistic}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    middle = chosen[statistic].to_numpy(dtype=float)
    panel.errorbar(
        middle,
        range(len(order)),
        xerr=np.nan_to_num(np.abs([middle - low, high - middle])),
        fmt="none",
        color="black",
        lw=1,
    )
    panel.set_yticks(range(len(order)), [LABELS[name] for name in order], fontsize=8)
    panel.axvline(0.5 if statistic == "auroc" else 0, color="black", lw=0.8)
    panel.set_xlabel(label, fontsize=9)
    _clean(panel)


def depth_panel(
    panel: Axes,
    tables: Mapping[str, pd.DataFrame],
    predictor: str = "policy_shift",
    legend: bool = False,
) -> None:
    """Median ratio of the true KL to a prediction, and its 10 % and 90 % quantiles, over the depth
    trained.

    Args:
        tables: label -> rows with ``target = kl``, by depth and predictor.
    """
    for i, ((label, table), (color, marker)) in enumerate(
        zip(tables.items(), STYLES, strict=False)
    ):
        rows = table[table["predictor"] == predictor].set_index("depth")
        depths = [d for d in DEPTHS if d in rows.index and np.isfinite(rows.loc[d, "ratio_50"])]
        if not depths:
            continue
        x = [DEPTHS.index(d) + (i - (len(tables) - 1) / 2) * 0.12 for d in depths]
        middle, low, high = (
            rows.loc[depths, f"ratio_{q}"].to_numpy(dtype=float) for q in (50, 10, 90)
        )
        panel.errorbar(
            x, middle, yerr=(middle - low, high - middle), color=color, marker=marker, ms=5, lw=1.5,
            capsize=3, label=label or None,
        )  # fmt: skip
    panel.axhline(1, color="black", lw=0.8, ls="--")
    panel.set_yscale("log")
    shown = [d for d in DEPTHS if any(d in set(table["depth"]) for table in tables.values())]
    panel.set_xticks([DEPTHS.index(d) for d in shown], [DEPTH_LABELS[d] for d in shown], fontsize=8)
    panel.set_xlabel("what is trained", fontsize=9)
    panel.set_ylabel(f"true KL / {LABELS[predictor]}  (median, 10–90 %)", fontsize=9)
    if legend:
        panel.figure.legend(
            *panel.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(tables),
            frameon=False,
            fontsize=8,
        )
    _clean(panel)


def rank_panel(
    panel: Axes, tables: Mapping[str, pd.DataFrame], predictor: str = "policy_shift"
) -> None:
    """Spearman correlation of a prediction with the true token KL over the depth trained; as
    :func:`depth_panel`.
    """
    for (label, table), (color, marker) in zip(tables.items(), STYLES, strict=False):
        rows = table[table["predictor"] == predictor].set_index("depth")
        depths = [d for d in DEPTHS if d in rows.index]
        x, y = [DEPTHS.index(d) for d in depths], rows.loc[depths, "spearman"].to_numpy(dtype=float)
        low, high = (
            rows.loc[depths, f"spearman_{end}"].to_numpy(dtype=float) for end in ("low", "high")
        )
        panel.errorbar(
            x,
            y,
            yerr=np.nan_to_num([y - low, high - y]),
            color=color,
            marker=marker,
            ms=5,
            lw=1.5,
            label=label,
        )
    panel.set_xticks(range(len(DEPTHS)), [DEPTH_LABELS[d] for d in DEPTHS], fontsize=8)
    panel.axhline(0, color="black", lw=0.8)
    panel.set_xlabel("what is trained", fontsize=9)
    panel.set_ylabel(f"Spearman of {LABELS[predictor]} with the true token KL", fontsize=9)
    _clean(panel)


def batch_panel(panel: Axes, batches: pd.DataFrame) -> None:
    """Mean true KL over the predicted shift of each step, one colour per learning rate, and the
    line on which they are equal.

    Args:
        batches: columns ``lr, policy_shift, kl/all``.
    """
    values = batches[(batches["policy_shift"] > 0) & (batches["kl/all"] > 0)]
    for (lr, rows), (color, marker) in zip(values.groupby("lr"), STYLES, strict=False):
        panel.scatter(
            rows["policy_shift"],
            rows["kl/all"],
            s=14,
            color=color,
            marker=marker,
            alpha=0.7,
            lw=0,
            label=f"lr {lr:g}",
        )
    both = values[["policy_shift", "kl/all"]].to_numpy(dtype=float)
    limits = [both.min(), both.max()]
    panel.plot(limits, limits, color="black", lw=0.8, ls="--", label="true = predicted")
    panel.set(xscale="log", yscale="log")
    panel.set_xlabel("predicted: batch $m_F$ (nats)", fontsize=9)
    panel.set_ylabel("mean true token KL (nats)", fontsize=9)
    panel.legend(frameon=False, fontsize=7)
    _clean(panel)


def _short(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _whole(step: int) -> Locator:
    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(step)


def _nothing(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", color=GREY)
    panel.set_axis_off()


def _clean(panel: Axes) -> None:
    panel.grid(alpha=0.25)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
