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
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from capo_verl.viewer.groups import Group
from capo_verl.viewer.panels import AXES, Panel, axis_values, choose_axis, shown_panels
from capo_verl.viewer.series import Run

SCRIPTS = ("common.js", "series.js", "plot.js", "curves.js", "configs.js", "tokens.js", "main.js")
DIGITS = 6
MOST_RUNS = 100


def write_page(groups: Sequence[Group], path: Path, title: str = "CAPO report") -> None:
    """Write the page about these runs.

    Raises:
        ValueError: for more runs than a page can show.
    """
    runs = [run for group in groups for run in group.runs]
    if len(runs) > MOST_RUNS:
        raise ValueError(
            f"{len(runs)} runs are more than a page can show ({MOST_RUNS}); name fewer, or choose "
            "with --where"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(groups, title), encoding="utf-8")


def render(groups: Sequence[Group], title: str) -> str:
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
        ("DATA", embed(page_data(groups))),  # last, because it may contain anything
    ):
        page = page.replace(f"@{name}@", text)
    return page


def page_data(groups: Sequence[Group]) -> dict[str, Any]:
    """Data of the page's script.

    Panels, groups of runs, and for each run its curves, x axes, configuration and samples.
    """
    runs = [run for group in groups for run in group.runs]
    panels = [(panel, panel.curves_of(runs)) for panel in shown_panels(runs)]
    numbers = {id(run): index for index, run in enumerate(runs)}
    return {
        "axes": AXES,
        "axis": choose_axis(runs),
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
                "source": str(run.source),
                "axes": {axis: _axis(run, axis) for axis in AXES if axis != "steps"},
                "panels": {
                    panel.key: [
                        [series.steps, [_round(v) for v in series.values]]
                        for series in (panel.series(run, curve) for curve in curves)
                    ]
                    for panel, curves in panels
                },
                "config": run.config and {key: _plain(value) for key, value in run.config.items()},
                "samples": run.samples,
            }
            for index, run in enumerate(runs)
        ],
    }


def embed(data: Any) -> str:
    """JSON for a ``<script>`` element: nothing in it can end the element or begin another."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _panel(panel: Panel, labels: list[str]) -> dict[str, Any]:
    return {
        "key": panel.key, "title": panel.title, "unit": panel.unit, "log": panel.log,
        "limits": panel.limits, "curves": labels,
    }  # fmt: skip


def _axis(run: Run, axis: str) -> dict[int, float] | None:
    found = axis_values(run, axis)
    return None if found is None else {step: _round(x, 10) for step, x in found.items()}


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _round(value: float, digits: int = DIGITS) -> float:
    return float(f"{value:.{digits}g}")


def _asset(name: str) -> str:
    return (files("capo_verl.viewer") / "assets" / name).read_text(encoding="utf-8")


def _checksum(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
