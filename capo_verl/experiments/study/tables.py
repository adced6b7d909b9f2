# SPDX-License-Identifier: Apache-2.0
"""A study's tables as markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import pandas as pd

from capo_verl.experiments.study.compare import (
    SHARE,
    differences,
    efficiency,
    interval,
    over_rates,
    scores,
    tuned_control,
)
from capo_verl.experiments.study.frame import ordered, study_frame
from capo_verl.experiments.study.grid import Study

MARKS = {"better": " ▲", "worse": " ▼", "same": ""}


def study_tables(study: Study, runs: pd.DataFrame, curves: pd.DataFrame) -> str:
    """All tables of a study; see :func:`frame_tables`."""
    frame = study_frame(study, runs)
    if frame.empty:
        return f"### {study.name}\n\nno results yet\n"
    return frame_tables(frame, curves[curves["run_id"].isin(frame["run_id"])])


def frame_tables(frame: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Final accuracy by learning rate, the summary per method, and efficiency."""
    name, control = frame["study"].iloc[0], frame["control"].iloc[0]
    frame = ordered(frame)
    failed = frame[frame["status"] == "failed"]
    parts = [f"### {name}", *final_tables(frame), summary_table(frame)]
    if frame["lr"].nunique() > 1:
        parts.append(efficiency_table(frame, curves))
    seeds = frame.groupby(["method", "cell"])["seed"].nunique()
    count = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    parts.append(
        f"{frame['run_id'].nunique()} runs, {count} seeds per cell; ▲ / ▼: better / worse than "
        f"`{control}` in the same cell, paired by seed (both 95 % intervals exclude 0)."
        + (f" {len(failed)} failed: {_failures(failed)}." if len(failed) else "")
    )
    return "\n\n".join(parts) + "\n"


def final_tables(frame: pd.DataFrame) -> list[str]:
    """Final accuracy per cell without learning rate, methods by learning rates."""
    frame = scores(frame, "final").copy()
    frame["rest"] = [_rest(c) for c in frame["cell"]]
    frame["row"] = _rows(frame)
    marks = {(d.method, d.cell): MARKS[d.verdict] for d in differences(frame)}
    rates = sorted(frame["lr"].unique())
    tables = []
    for rest, rows in frame.groupby("rest", sort=False):
        body = []
        for name, of_row in rows.groupby("row", sort=False):
            cells = []
            for lr in rates:
                at = of_row[of_row["lr"] == lr]
                mark = marks.get((at["method"].iloc[0], at["cell"].iloc[0]), "") if len(at) else ""
                cells.append(_cell(at) + mark)
            body.append([str(name), *cells])
        tables.append(
            _titled(
                f"Final accuracy, {rest}" if rest else "Final accuracy",
                ["method", *(f"lr {r:g}" for r in rates)],
                body,
            )
        )
    return tables


def _cell(rows: pd.DataFrame) -> str:
    """Mean, interval, and how many collapsed."""
    if rows.empty:
        return ""
    mean, low, high = interval(list(rows["final"]))
    collapsed = int(rows["collapsed"].fillna(True).astype(bool).sum())
    spread = f" [{_short(low)}, {_short(high)}]" if len(rows) > 1 else ""
    return _short(mean) + spread + (f" †{collapsed}/{len(rows)}" if collapsed else "")


SUMMARISED = ("mean_kl", "mean_rejection", "mean_scale", "final_entropy", "seconds")
"""Columns of a run whose means end a row of the summary."""
LAST = {
    "mean_rejection_positive": "rejected of A > 0", "mean_rejection_negative": "of A < 0",
    "last_entropy": "last entropy", "last_outside": "outside the top 50", "last_ended": "ended",
    "seconds_per_step": "s per step",
}  # fmt: skip
"""Columns that follow where the tier keeps its steps, and their heads."""


def summary_table(frame: pd.DataFrame) -> str:
    """Summary of every method over all cells.

    Verdicts, worst difference, area over learning rates, collapses, KL, scale, rejection, time.
    """
    found, areas, by_step = differences(frame), over_rates(frame), "dead" in frame
    scored = scores(frame, "final")
    body = []
    for method, rows in scored.groupby("method", sort=False):
        mine = [d for d in found if d.method == method]
        verdicts = (
            " / ".join(str(sum(d.verdict == v for d in mine)) for v in ("better", "same", "worse"))
            if mine
            else ""
        )
        worst = min((d.estimate.mean for d in mine), default=None)
        area = areas.loc[areas["method"] == method, "mean"]
        body.append(
            [
                str(method), verdicts, "" if worst is None else f"{worst:+.3f}",
                f"{area.mean():+.3f}" if len(area) else "",
                _short(rows["final"].mean()), _short(rows["lowest"].mean()),
                f"{int(rows['collapsed'].fillna(True).astype(bool).sum())}/{len(rows)}",
                *(_number(rows, column) for column in SUMMARISED),
                *((_deaths(rows), *(_number(rows, c) for c in LAST)) if by_step else ()),
            ]
        )  # fmt: skip
    head = [
        "method", "better / same / worse", "worst cell", "area over lr", "final", "lowest",
        "collapsed", "KL per step", "rejected", "lr scale", "entropy", "s per run",
        *(("died", *LAST.values()) if by_step else ()),
    ]  # fmt: skip
    return _titled(f"All cells, control `{frame['control'].iloc[0]}`", head, body)


def _deaths(rows: pd.DataFrame) -> str:
    dead = rows["dead"].dropna().astype(bool)
    return f"{int(dead.sum())}/{len(dead)}"


def efficiency_table(frame: pd.DataFrame, curves: pd.DataFrame) -> str:
    """Median completions and accepted tokens until the tuned control's accuracy.

    It also has the number of runs that got there.
    """
    reached = efficiency(frame, curves)
    reached["rest"] = [_rest(c) for c in reached["cell"]]
    reached["row"] = _rows(reached)
    tuned = "; ".join(
        f"{_text(json.loads(cell)) or 'all'}: lr {lr:g}, {_short(v)}"
        for cell, (lr, v) in tuned_control(frame).items()
    )
    rates = sorted(reached["lr"].unique())
    body = []
    for (rest, method), rows in reached.groupby(["rest", "row"], sort=False):
        cells = []
        for lr in rates:
            at = rows[rows["lr"] == lr]
            got = at[at["completions"].notna()]
            if at.empty:
                cells.append("")
            elif got.empty:
                cells.append("–")
            else:
                cells.append(
                    f"{got['completions'].median():.0f} "
                    f"({got['accepted_tokens'].median() / 1000:.0f}k) {len(got)}/{len(at)}"
                )
        body.append([rest, method, *cells])
    title = (
        f"Completions (accepted tokens) to {SHARE:.0%} of the tuned control ({tuned}); runs that "
        "got there"
    )
    return _titled(title, ["cell", "method", *(f"lr {r:g}" for r in rates)], body)


def _titled(title: str, head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _rest(cell: str) -> str:
    """Cell of a table: that of a run without learning rate and dotted axes."""
    return _text({k: v for k, v in json.loads(cell).items() if k != "lr" and "." not in k})


def _rows(frame: pd.DataFrame) -> list[str]:
    """Names of a table's rows: the method, with its values of the dotted axes."""
    cells = [
        {k.split(".")[-1]: v for k, v in json.loads(c).items() if "." in k} for c in frame["cell"]
    ]
    return [f"{m}, {_text(c)}" if c else m for m, c in zip(frame["method"], cells, strict=True)]


def _text(cell: dict[str, str]) -> str:
    return ", ".join(v if k in ("task", "name") else f"{k} {v}" for k, v in cell.items())


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if 0 <= value < 1 else f"{value:.3f}"


def _number(rows: pd.DataFrame, column: str) -> str:
    if column not in rows or rows[column].isna().all():
        return ""
    value = rows[column].mean()
    return f"{value:.1f}" if column == "seconds" else f"{value:.2g}"


def _failures(failed: pd.DataFrame) -> str:
    counts = failed["error"].str.split("\n").str[0].value_counts()
    return "; ".join(f"{n} x {error}" for error, n in counts.items())
