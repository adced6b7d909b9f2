# SPDX-License-Identifier: Apache-2.0
"""Progress on the terminal: phases with a bar, and one line per RL step.

Plain lines if stdout is not a terminal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from capo_verl.cpu.quickstart.records import Record


class Display:
    """Output of a run on the terminal.

    Args:
        console: where to print; a terminal gets live bars, anything else one line per event.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._header_shown = False

    def say(self, text: str = "") -> None:
        """One line of plain text."""
        self._print(escape(text))

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """A phase of the run; reports its duration at the end."""
        start = time.monotonic()
        if self.console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}", style="dim"),
            )
            with Progress(*columns, console=self.console, transient=True) as progress:
                phase = Phase(progress, progress.add_task(name, total=1.0, note=""))
                yield phase
        else:
            self.say(f"{name} ...")
            phase = Phase()
            yield phase
        if self.console.is_terminal:
            mark = "[green]✓[/green]" if phase.ok else "[red]✗[/red]"
        else:
            mark = "done:" if phase.ok else "failed:"
        summary = f" ({escape(phase.summary)})" if phase.summary else ""
        self._print(f"{mark} {escape(name)} [dim]{time.monotonic() - start:.0f} s[/dim]{summary}")

    def step(self, record: Record, completions: int | None, total_steps: int | None) -> None:
        """One line for a step of the RL run."""
        if not self._header_shown:
            self._header_shown = True
            self._print(f"[bold]{HEADER}[/bold]")
        self.say(step_line(record, completions, total_steps))

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Two columns under a title."""
        table = Table(title=escape(title), title_justify="left", show_header=False)
        for what, value in rows:
            table.add_row(escape(what), escape(value))
        self.console.print(table)

    def _print(self, markup: str) -> None:
        self.console.print(markup, soft_wrap=True, highlight=False)


class Phase:
    """Handle of a phase in progress. ``summary`` and ``ok`` show in its closing line."""

    def __init__(self, progress: Progress | None = None, task_id: TaskID | None = None) -> None:
        self._progress, self._task_id = progress, task_id
        self.summary = ""
        self.ok = True

    def update(self, fraction: float, note: str = "") -> None:
        """Set the bar (0..1) and the remark beside it."""
        if self._progress is not None and self._task_id is not None:
            self._progress.update(self._task_id, completed=fraction, note=note)


HEADER = (
    f"{'step':>9} {'completions':>12} {'training':>9} {'held-out':>9} {'rejected':>9} {'m_F':>9} "
    f"{'s/step':>7}"
)


def step_line(record: Record, completions: int | None, total_steps: int | None) -> str:
    """The columns of :data:`HEADER` for one record; a dash for what was not logged."""
    step = f"{record.step}/{total_steps}" if total_steps else str(record.step)
    cells = (
        f"{step:>9}",
        f"{'-' if completions is None else f'{completions:,}':>12}",
        f"{_cell(record.train_accuracy, '.3f'):>9}",
        f"{_cell(record.held_out_accuracy, '.3f'):>9}",
        f"{_cell(record.rejection_rate, '.2%'):>9}",
        f"{_cell(record.policy_shift, '.1e'):>9}",
        f"{_cell(record.seconds, '.1f'):>7}",
    )
    return " ".join(cells)


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
