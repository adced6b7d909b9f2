# SPDX-License-Identifier: Apache-2.0
"""The calibration study's results on disk, as tables in Markdown and as figures: all made from the
same parquet files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from capo_verl.commands.calibrate import pictures, tables
from capo_verl.commands.calibrate.policy import DEPTHS
from capo_verl.commands.calibrate.predictors import LABELS
from capo_verl.commands.calibrate.statistics import interval, spearman
from capo_verl.experiments.calibration.study import runs_by_source
from capo_verl.experiments.wrap import wrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("calibration", "calibration_batches", "calibration_tokens")
PAGE = "calibration.md"
HEAD = """# Calibration: all tables and figures

Written by `python -m capo_verl.experiments.calibration draw` from `calibration*.parquet`.
[docs/calibrate.md](../../../docs/calibrate.md) says how to read them,
[docs/evidence.md](../../../docs/evidence.md) what follows.
"""
FIGURES = {
    "calibration_tokens": "Predicted policy shift and true KL",
    "calibration_predictors": "Predictors of the true KL",
    "calibration_depth": "Calibration over the depth trained",
    "calibration_batch": "Predicted policy shift of the batch and the KL of its step",
}
"""The figures of :func:`draw`, with their captions."""
BATCH_PREDICTORS = {
    "constant": "a constant",
    "policy_shift": "batch m_F",
    "policy_shift_exact": "batch m_F, exact Fisher",
    "head_step": "LM head's real step",
}

Frames = Mapping[str, pd.DataFrame]


def save(results: object, folder: Path, replace: Sequence[str]) -> None:
    """Write the tables; rows of the tiers ``replace`` that are there already go, those of other
    tiers stay.

    Args:
        results: :class:`capo_verl.experiments.calibration.study.Results`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, new in results.frames().items():  # type: ignore[attr-defined]
        path = folder / f"{name}.parquet"
        if path.exists():
            old = pd.read_parquet(path)
            new = pd.concat([old[~old["tier"].isin(list(replace))], new], ignore_index=True)
        new.to_parquet(path, compression="zstd", index=False)


def load(folder: Path) -> dict[str, pd.DataFrame]:
    """
    Raises:
        ValueError: naming the file that is missing.
    """
    missing = [name for name in FILES if not (folder / f"{name}.parquet").exists()]
    if missing:
        raise ValueError(
            f"{folder / missing[0]}.parquet is not there; `capo_verl.experiments.calibration run` "
            "makes it"
        )
    frames = {name: pd.read_parquet(folder / f"{name}.parquet") for name in FILES}
    # The first step of a run has no moments: its m_F is that of plain gradient ascent.
    return {name: frame[frame["step"] > 0].reset_index(drop=True) for name, frame in frames.items()}


def markdown(frames: Frames) -> str:
    """The page: all figures and tables."""
    steps, batches, tokens = (frames[name] for name in FILES)
    at_all = steps[(steps["depth"] == "all") & (steps["target"] == "kl")]
    sources = dict(runs_by_source(at_all))
    shown = [name for name in FIGURES if name != "calibration_batch" or _long_runs(batches)]
    parts = [
        HEAD,
        *(f"![{FIGURES[name]}]({name}.png)" for name in shown),
        "",
        "## What predicts a token's KL divergence?\n",
        "Spearman correlation with the true KL(old‖new) of a response token within a step, all "
        "parameters trained. Means over "
        "steps with 95 % bootstrap intervals.\n",
        _predictor_table(sources, "spearman"),
        "AUROC of finding the 1 % of the tokens with the largest true KL.\n",
        _predictor_table(sources, "auroc"),
        "## How far off is m_F, and how does that depend on what is trained?\n",
        "True KL / m_F: median over tokens, with the 10 % and 90 % quantiles, geometric means over "
        "steps; and the Spearman "
        "correlation. The step is the same in every column, but for the parameters below that are "
        "put back.\n",
        _depth_table(steps),
        "Along a run, and over learning rates (all parameters trained; slope: of log KL over log "
        "m_F):\n",
        _course_table(at_all),
        "## Does m_H predict the change of the objective?\n",
        "Against A(π_new/π_old − 1) of the token, all parameters trained.\n",
        _objective_table(steps),
        "## Does the prediction for the batch say how large a step will be?\n",
        "By what factor a step's mean KL typically differs from a prediction that was calibrated "
        "on the same run (the exponential "
        "of the standard deviation of log(true/predicted) over its steps, geometric mean over "
        "runs); ×1 would be perfect, a "
        "constant knows nothing of the step. Then the Spearman correlation over the steps of a "
        "run, and the range of "
        "true/predicted over all runs.\n",
        _batch_table(batches),
        "Pooled over steps, runs and learning rates (token sample), the Spearman correlation of "
        "m_F with the true KL is "
        + "; ".join(
            f"{spearman(rows['policy_shift'].to_numpy(), rows['kl'].to_numpy()):.2f} ({name})"
            for name, rows in runs_by_source(tokens)
        )
        + ".\n",
    ]
    return wrapped("\n".join(parts))


def draw(frames: Frames, folder: Path) -> list[Path]:
    """All figures as PNG and SVG; their paths."""
    made = {
        "calibration_tokens": _tokens_figure(frames["calibration_tokens"]),
        "calibration_predictors": _predictors_figure(frames["calibration"]),
        "calibration_depth": _depth_figure(frames["calibration"]),
    }
    batches = _long_runs(frames["calibration_batches"])
    if batches:
        made["calibration_batch"] = _batch_figure(batches)
    return [
        path for name, picture in made.items() for path in pictures.save(picture, folder / name)
    ]


def _long_runs(batches: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Sources with enough measured steps for a panel."""
    return {name: rows for name, rows in runs_by_source(batches) if len(rows) >= 8}


def _predictor_table(sources: Mapping[str, pd.DataFrame], statistic: str) -> str:
    found = {
        name: tables.aggregate(rows, ("predictor",)).set_index("predictor")
        for name, rows in sources.items()
    }
    rows = [
        [
            _plain(predictor),
            *(tables.cell(found[name].loc[predictor], statistic) for name in sources),
        ]
        for predictor in LABELS
    ]
    return tables.markdown(["predictor", *sources], rows)


def _depth_table(steps: pd.DataFrame) -> str:
    own = steps[(steps["target"] == "kl") & (steps["predictor"] == "policy_shift")]
    rows = []
    for name, source in runs_by_source(own):
        found = tables.aggregate(source, ("depth",)).set_index("depth")
        ratios = [_ratio(found.loc[d]) if d in found.index else "" for d in DEPTHS]
        ranks = [f"{found.loc[d, 'spearman']:.2f}" if d in found.index else "" for d in DEPTHS]
        rows += [[name, "ratio", *ratios], ["", "Spearman", *ranks]]
    return tables.markdown(["", "", *(pictures.DEPTH_LABELS[d] for d in DEPTHS)], rows)


def _course_table(at_all: pd.DataFrame) -> str:
    own = at_all[at_all["predictor"] == "policy_shift"]
    rows = []
    for name, source in runs_by_source(own):
        found = tables.aggregate(
            source.sort_values(["lr", "phase"], kind="stable"), ("lr", "phase")
        )
        rows += [
            [
                name,
                f"{r['lr']:g}",
                str(r["phase"]),
                tables.cell(r, "spearman"),
                tables.cell(r, "slope"),
                _ratio(r),
            ]
            for _, r in found.iterrows()
        ]
    return tables.markdown(
        ["", "learning rate", "phase", "Spearman", "slope", "true KL / m_F"], rows
    )


def _objective_table(steps: pd.DataFrame) -> str:
    own = steps[(steps["depth"] == "all") & (steps["target"] == "objective")]
    rows = []
    for name, source in runs_by_source(own):
        r = tables.aggregate(source, ("predictor",)).iloc[0]
        rows.append(
            [
                name,
                tables.cell(r, "spearman"),
                tables.cell(r, "same_sign"),
                tables.cell(r, "auroc"),
                _ratio(r),
            ]
        )
    return tables.markdown(
        ["", "Spearman", "same sign", "AUROC of the largest 1 %", "abs true / abs m_H"], rows
    )


def _batch_table(batches: pd.DataFrame) -> str:
    rows = []
    for name, source in runs_by_source(batches):
        runs = [run for _, run in source.groupby(["lr", "seed"]) if len(run) >= 4]
        if not runs:
            continue
        for predictor, label in BATCH_PREDICTORS.items():
            spread = interval([tables.spread(run, predictor) for run in runs], geometric=True)
            row = {"spread": spread.mean, "spread_low": spread.low, "spread_high": spread.high}
            if predictor == "constant":
                rows.append([name, label, "×" + tables.cell(row, "spread"), "", ""])
                continue
            rank = interval(
                [spearman(run[predictor].to_numpy(), run["kl/all"].to_numpy()) for run in runs]
            )
            row |= {"rank": rank.mean, "rank_low": rank.low, "rank_high": rank.high}
            ratio = (source["kl/all"] / source[predictor]).to_numpy()
            ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
            limits = f"{tables.magnitude(ratio.min())} – {tables.magnitude(ratio.max())}"
            rows.append(
                ["", label, "×" + tables.cell(row, "spread"), tables.cell(row, "rank"), limits]
            )
    if not rows:
        return "No run with four measured steps.\n"
    return tables.markdown(
        ["", "prediction", "typical error", "Spearman", "true / predicted"], rows
    )


def _tokens_figure(tokens: pd.DataFrame) -> Figure:
    sources = dict(runs_by_source(tokens))
    picture, panels = _grid("Predicted policy shift and true KL of response tokens", len(sources))
    for panel, (name, rows) in zip(panels, sources.items(), strict=True):
        pictures.calibration_panel(
            panel, rows["policy_shift"].to_numpy(float), rows["kl"].to_numpy(float)
        )
        panel.set_title(f"{name}\n{panel.get_title(loc='left')}", fontsize=9, loc="left")
    return picture


def _predictors_figure(steps: pd.DataFrame) -> Figure:
    sources = dict(runs_by_source(steps[(steps["depth"] == "all") & (steps["target"] == "kl")]))
    names = list(sources)
    picture = pictures.new_figure(
        "What predicts the true KL of a token? Blue: CAPO's predictions",
        (2.6 * len(names) + 1, 6.2),
    )
    panels = picture.subplots(2, len(names), squeeze=False, sharey=True)
    for column, name in enumerate(names):
        table = tables.aggregate(sources[name], ("predictor",))
        pictures.bars_panel(panels[0, column], table, "spearman", "Spearman within a step")
        pictures.bars_panel(panels[1, column], table, "auroc", "AUROC, largest 1 % of the KL")
        panels[0, column].set_title(name, fontsize=9)
        panels[1, column].set_xlim(0, 1)
    return picture


def _depth_figure(steps: pd.DataFrame) -> Figure:
    kl = steps[steps["target"] == "kl"]
    found = {
        name: tables.aggregate(rows, ("depth", "predictor")) for name, rows in runs_by_source(kl)
    }
    picture = pictures.new_figure("Calibration over the depth trained", (12, 4.8))
    ratio, step, rank = picture.subplots(1, 3)
    pictures.depth_panel(ratio, found, legend=True)
    pictures.depth_panel(step, found, "head_step")
    pictures.rank_panel(rank, found)
    return picture


def _batch_figure(sources: Mapping[str, pd.DataFrame]) -> Figure:
    picture, panels = _grid(
        "Predicted policy shift of the batch and mean true KL of each measured step", len(sources)
    )
    for panel, (name, rows) in zip(panels, sources.items(), strict=True):
        pictures.batch_panel(panel, rows)
        panel.set_title(name, fontsize=9, loc="left")
    return picture


def _grid(title: str, n: int) -> tuple[Figure, list]:  # type: ignore[type-arg]
    columns = min(4, n)
    lines = -(-n // columns)
    picture = pictures.new_figure(title, (3.6 * columns, 3.6 * lines + 0.3))
    panels = list(picture.subplots(lines, columns, squeeze=False).flat)
    for empty in panels[n:]:
        empty.set_axis_off()
    return picture, panels[:n]


def _plain(predictor: str) -> str:
    names = {
        "policy_shift": "m_F", "policy_shift_exact": "m_F, exact Fisher",
        "policy_shift_sgd": "m_F, SGD model",
        "head_step": "LM head's real step (known only afterwards)", "entropy": "entropy",
        "surprisal": "−log p", "advantage": "abs A", "advantage_miss": "A²(1−p)²", "hidden": "‖h‖²",
    }  # fmt: skip
    return names[predictor]


def _ratio(row: pd.Series) -> str:
    low, middle, high = (tables.magnitude(row[f"ratio_{q}"]) for q in (10, 50, 90))
    return f"{middle} ({low} – {high})"
