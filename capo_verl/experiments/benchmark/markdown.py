# SPDX-License-Identifier: Apache-2.0
"""A report as tables, and its place in docs/performance.md."""

from __future__ import annotations

import re
from pathlib import Path

from capo_verl.commands.measure.contenders import LABELS
from capo_verl.commands.measure.results import Report
from capo_verl.commands.measure.targets import judge_targets
from capo_verl.experiments.wrap import wrapped

BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
COLUMNS = (
    "tokens", "contender", "evaluate ms", "update ms", "times (a)'s speed", "times (a')'s speed",
    "extra MiB", "of (a)'s",
    "held MiB", "scratch MiB", "update scratch MiB", "evaluate GB/s", "rows once GB/s",
    "update GB/s",
)  # fmt: skip
_MIB, _GB = 1 << 20, 1e9


def cells(report: Report) -> list[list[str]]:
    """The rows of the table, as text.

    A contender that did not run says why; only once if it never did for that reason.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    never: dict[tuple[str, ...], list[str]] = {}
    for r in sorted(report.results, key=lambda r: (r.tokens, list(LABELS).index(r.contender))):
        if r.skipped:
            everywhere = all(
                x.skipped == r.skipped for x in report.results if x.contender == r.contender
            )
            row = ["all" if everywhere else f"{r.tokens:,}", f"{LABELS[r.contender]}: {r.skipped}"]
            (never if everywhere else rows)[tuple(row)] = row + ["—"] * (len(COLUMNS) - 2)
            continue
        memory_ratio, bandwidth = report.memory_ratio(r), report.bandwidth(r)
        row = [
            f"{r.tokens:,}",
            LABELS[r.contender],
            _number(r.evaluate_seconds * 1e3),
            _number(r.update_seconds * 1e3),
            *(
                "—" if x is None else f"{x:.2f}"
                for x in (report.speedup(r), report.speedup(r, over="naive_reused"))
            ),
            _number(r.extra_bytes / _MIB),
            "—" if memory_ratio is None else f"{memory_ratio:.3f}",
            *(
                _number(x / _MIB)
                for x in (r.held_bytes, r.evaluate_scratch_bytes, r.update_scratch_bytes)
            ),
            *(_number(bandwidth[x] / _GB) for x in ("evaluate", "evaluate_rows_once", "update")),
        ]
        rows[tuple(row)] = row
    return [*rows.values(), *never.values()]


def growth_lines(report: Report) -> list[str]:
    """A sentence per contender: the growth of its time with tokens."""
    lines = []
    for key, label in LABELS.items():
        evaluate, update = report.growth(key, "evaluate"), report.growth(key, "update")
        if evaluate and update:
            lines.append(
                f"{label}: time ~ tokens^x with x = {evaluate.largest:.2f} (evaluate) and "
                f"{update.largest:.2f} (accumulate + update) between the two largest sizes, "
                f"{evaluate.overall:.2f} and {update.overall:.2f} overall."
            )
    return lines


def heading(report: Report) -> str:
    return f"{report.title} on {report.environment['processor']}"


def markdown(report: Report) -> str:
    """One run: where, table, growth, targets."""
    e = report.environment
    gpu = (
        f", CUDA {e['cuda']}, Triton {e['triton']}"
        if "cuda" in e
        else f", {e['threads']} of {e['cores']} cores"
    )
    if e["allocator"] != "default":
        gpu += f", {e['allocator']}"
    copy = report.copy_bytes_per_second / _GB
    lines = [
        f"### {heading(report)}",
        "",
        f"{e['processor']}{gpu}, torch {e['torch']}, commit {e['commit']}. Time: {e['clock']}. "
        f"Copy bandwidth {copy:,.1f} GB/s.",
        "",
        *_table(COLUMNS, cells(report)),
        "",
        *(f"* {line}" for line in growth_lines(report)),
    ]
    verdicts = judge_targets(report)
    if verdicts:
        rows = [[v.target, v.measured, "yes" if v.met else "**no**"] for v in verdicts]
        lines += ["", *_table(("target", "measured", "met"), rows)]
    return wrapped("\n".join(lines).rstrip() + "\n")


def update_docs(report: Report, page: Path) -> None:
    """Replace this machine's and workload's run between the markers of ``page``, or append it;
    others stay.

    Raises:
        ValueError: if the page lacks the markers.
    """
    before, runs, after = read_docs(page)
    runs[f"### {heading(report)}"] = markdown(report)
    page.write_text(
        f"{before}{BEGIN}\n\n"
        + "\n".join(run.strip() + "\n" for run in runs.values())
        + f"\n{END}{after}"
    )


def read_docs(page: Path) -> tuple[str, dict[str, str], str]:
    """Text before the markers, heading -> run between them, text after them.

    Raises:
        ValueError: if the page lacks the markers.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    inside, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: expected the lines {BEGIN} and {END}, in this order")
    runs = [run for run in re.split(r"(?m)^(?=### )", inside.strip()) if run]
    return before, {run.splitlines()[0]: run for run in runs}, after


def _table(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _number(x: float) -> str:
    """Three significant digits, without exponents."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"
