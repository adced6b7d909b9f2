# SPDX-License-Identifier: Apache-2.0
"""Time and memory against tokens, both axes logarithmic."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from capo_verl.benchmark.contenders import LABELS
from capo_verl.benchmark.markdown import heading
from capo_verl.benchmark.report import Report
from capo_verl.quickstart.figure import BLUE, GREEN, GREY, ORANGE

COLORS = dict(zip(LABELS, (ORANGE, GREY, BLUE, GREEN), strict=True))
_MIB = 1 << 20


def draw(report: Report) -> Figure:
    """Left: seconds of evaluate (solid) and of accumulate + update (dashed). Right: extra memory (solid), its scratch (dashed)."""
    figure = Figure(figsize=(10.0, 4.4), layout="constrained")  # no pyplot: no global state, no display
    time, memory = figure.subplots(1, 2)
    figure.suptitle(heading(report), fontsize=11, fontweight="bold", x=0.01, ha="left")
    for contender, label in LABELS.items():
        results = report.measured(contender)
        if not results:
            continue
        tokens = [r.tokens for r in results]
        solid = {"color": COLORS[contender], "marker": "o", "ms": 4, "lw": 1.8}
        dashed = {**solid, "ls": "--", "lw": 1.2, "mfc": "white"}
        time.plot(tokens, [r.evaluate_seconds * 1e3 for r in results], label=f"{label}: evaluate", **solid)
        time.plot(tokens, [r.update_seconds * 1e3 for r in results], label=f"{label}: accumulate + update", **dashed)
        memory.plot(tokens, [r.extra_bytes / _MIB for r in results], label=f"{label}: peak", **solid)
        memory.plot(
            tokens, [r.evaluate_scratch_bytes / _MIB for r in results], label=f"{label}: evaluate's scratch", **dashed
        )
    time.set(ylabel="time (ms, median)")
    memory.set(ylabel="memory beside moments and inputs (MiB)")
    for panel in (time, memory):
        panel.set(xscale="log", yscale="log", xlabel="tokens")
        panel.set_xticks([t.tokens for t in report.traffic], [_short(t.tokens) for t in report.traffic])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    return figure


def save(report: Report, path: Path) -> None:
    """Draw and write a PNG."""
    draw(report).savefig(path, dpi=150)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
