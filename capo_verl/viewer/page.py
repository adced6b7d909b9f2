# SPDX-License-Identifier: Apache-2.0
"""The page of ``capo-verl report``: one HTML file with data, style and script in it.

It asks no network for anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from capo_verl.viewer.groups import Group
from capo_verl.viewer.notes import visible
from capo_verl.viewer.panels import (
    AXES,
    Curve,
    Panel,
    axis_values,
    choose_axis,
    require_drawable,
    shown_panels,
)
from capo_verl.viewer.plain import plain
from capo_verl.viewer.series import Run

SCRIPTS = ("common.js", "series.js", "plot.js", "curves.js", "configs.js", "tokens.js", "main.js")
DIGITS, MOST_DIGITS = 6, 15
DANGEROUS = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
MOST_RUNS = 100


def write_page(
    groups: Sequence[Group], path: Path, title: str = "CAPO report", notes: Sequence[str] = ()
) -> None:
    """Write the page about these runs.

    Args:
        notes: sentences about what is missing on it, besides those of the runs.

    Raises:
        ValueError: for more runs than a page can show, or if there are neither curves nor samples.
    """
    runs = [run for group in groups for run in group.runs]
    if len(runs) > MOST_RUNS:
        raise ValueError(
            f"{len(runs)} runs are more than a page can show ({MOST_RUNS}); name fewer, or choose "
            "with --where"
        )
    if not any(run.samples for run in runs):
        require_drawable(runs)
    page = render(groups, title, notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def render(groups: Sequence[Group], title: str, notes: Sequence[str] = ()) -> str:
    """The page's HTML.

    Only its own script and style can run in it: the policy in its head names their checksums.
    """
    style = _asset("report.css")
    script = "(() => {\n'use strict';\n" + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();"
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_checksum(style)}'; script-src "
        f"'{_checksum(script)}'; base-uri 'none'; form-action 'none'"
    )
    page = _asset("report.html")
    for name, text in (
        ("POLICY", policy),
        ("TITLE", html.escape(title)),
        ("STYLE", style),
        ("SCRIPT", script),
        ("DATA", embed(page_data(groups, notes))),  # last, because it may contain anything
    ):
        page = page.replace(f"@{name}@", text)
    return page


def page_data(groups: Sequence[Group], notes: Sequence[str] = ()) -> dict[str, Any]:
    """Data of the page's script.

    Notes, panels, groups of runs, and for each run its curves, x axes, configuration and samples.
    """
    runs = [run for group in groups for run in group.runs]
    panels = [(panel, panel.curves_of(runs)) for panel in shown_panels(runs)]
    digits = {panel.key: _digits(panel, curves, runs) for panel, curves in panels}
    numbers = {id(run): index for index, run in enumerate(runs)}
    return {
        "axes": AXES,
        "axis": choose_axis(runs),
        "notes": [visible(note) for note in (*notes, *(n for run in runs for n in run.notes))],
        "panels": [_panel(panel, [curve.label for curve in curves]) for panel, curves in panels],
        "groups": [
            {
                "label": group.label,
                "colour": number,
                "runs": [numbers[id(run)] for run in group.runs],
            }
            for number, group in enumerate(groups)
        ],
        "runs": [
            {
                "index": index,
                "name": run.name,
                "source": visible(str(run.source)),
                "axes": {axis: _axis(run, axis) for axis in AXES if axis != "steps"},
                "panels": {
                    panel.key: [
                        [series.steps, [_round(v, digits[panel.key]) for v in series.values]]
                        for series in (panel.series(run, curve) for curve in curves)
                    ]
                    for panel, curves in panels
                },
                "config": plain(run.config),
                "samples": run.samples,
            }
            for index, run in enumerate(runs)
        ],
    }


def embed(data: Any) -> str:
    """JSON for a ``<script>`` element: nothing in it can end the element or begin another.

    Halves of a surrogate pair, which no file can hold, are escaped as well.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False)
    return DANGEROUS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _panel(panel: Panel, labels: list[str]) -> dict[str, Any]:
    return {
        "key": panel.key, "title": panel.title, "unit": panel.unit, "log": panel.log,
        "limits": panel.limits, "curves": labels,
    }  # fmt: skip


def _axis(run: Run, axis: str) -> dict[int, float | None] | None:
    found = axis_values(run, axis)
    return None if found is None else {step: _round(x, 10) for step, x in found.items()}


def _digits(panel: Panel, curves: Sequence[Curve], runs: Sequence[Run]) -> int:
    """Significant digits of a panel's values: more where all of them are nearly the same."""
    values = [
        v for run in runs for curve in curves for v in panel.series(run, curve).known().values()
    ]
    largest, range_ = max(map(abs, values)), max(values) - min(values)
    more = math.ceil(math.log10(largest / range_)) if range_ else 0
    return min(DIGITS + max(more, 0), MOST_DIGITS)


def _round(value: float, digits: int) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else float(f"{value:.{digits}g}")


def _asset(name: str) -> str:
    return (files("capo_verl.viewer") / "assets" / name).read_text(encoding="utf-8")


def _checksum(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
