# SPDX-License-Identifier: Apache-2.0
"""Time and memory against tokens, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from capo_verl.commands.measure.contenders import LABELS
from capo_verl.commands.measure.results import Report
from capo_verl.experiments.benchmark.markdown import heading
from capo_verl.viewer.colours import BLUE, GREEN, GREY, ORANGE

COLORS = dict(zip(LABELS, (ORANGE, GREY, BLUE, GREEN), strict=True))
_MIB = 1 << 20


def draw(report: Report) -> Figure:
    """Left: seconds of evaluate (solid) and of accumulate + update.

    Right: extra memory (solid) and scratch of evaluate.
    """
    # No pyplot: no global state, no display.
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    time, memory = figure.subplots(1, 2)
    figure.suptitle(heading(report), fontsize=11, fontweight="bold", x=0.01, ha="left")
    for contender, label in LABELS.items():
        results = report.measured(contender)
        if not results:
            continue
        tokens = [r.tokens for r in results]
        solid = {"color": COLORS[contender], "marker": "o", "ms": 4, "lw": 1.8}
        dashed = {**solid, "ls": "--", "lw": 1.2, "mfc": "white"}
        time.plot(tokens, [r.evaluate_seconds * 1e3 for r in results], label=label, **solid)
        time.plot(tokens, [r.update_seconds * 1e3 for r in results], **dashed)
        memory.plot(tokens, [r.extra_bytes / _MIB for r in results], **solid)
        memory.plot(tokens, [r.evaluate_scratch_bytes / _MIB for r in results], **dashed)
    time.set(ylabel="time (ms, median)")
    time.set_title("solid: evaluate, dashed: accumulate + update", fontsize=9)
    memory.set(ylabel="memory beside moments and inputs (MiB)")
    memory.set_title("solid: peak, dashed: scratch of evaluate", fontsize=9)
    figure.legend(loc="outside lower center", ncols=len(LABELS), frameon=False, fontsize=9)
    for panel in (time, memory):
        panel.set(xscale="log", yscale="log", xlabel="tokens")
        panel.set_xticks(
            [t.tokens for t in report.traffic], [_short(t.tokens) for t in report.traffic]
        )
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def save(report: Report, path: Path) -> None:
    """Draw and write a PNG."""
    draw(report).savefig(path, dpi=150)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
