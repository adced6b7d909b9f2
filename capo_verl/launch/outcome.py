# SPDX-License-Identifier: Apache-2.0
"""``python -m capo_verl.launch.outcome``: what a batch job should do now that its driver has ended.

A run that was asked to stop, or whose job was preempted, is continued. One that failed is tried
again, unless it failed before at the same step: then the cause is not the machine. What was refused
as a configuration (exit code 2) would be refused again.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from capo_verl.plugin.state import REFUSED
from capo_verl.plugin.stop import Progress
from capo_verl.utils import TRACKER

FINISHED, REQUEUE, GIVE_UP = "finished", "requeue", "give up"
STANDSTILLS = 3
"""So many attempts in a row that were asked to stop, and failed or left no new checkpoint, end the
job.
"""


@dataclass(frozen=True)
class Attempt:
    """One attempt that did not complete the run; a line of the history file."""

    name: str
    exit_code: int
    stop_requested: bool
    trained: bool
    """True if it completed a step."""
    step: int
    """The last step that it completed; without one, the step that it resumed from."""
    checkpoint: int
    """Step of the newest checkpoint after it, 0 if there is none."""

    @property
    def failed(self) -> bool:
        return self.exit_code != 0 and not self.stop_requested


@dataclass(frozen=True)
class Outcome:
    action: str
    """FINISHED, REQUEUE or GIVE_UP."""
    reason: str


def decide(this: Attempt, progress: Progress | None, earlier: Sequence[Attempt]) -> Outcome:
    """Decide what to do.

    Args:
        this: the attempt that has just ended.
        progress: what it wrote about the run, None if it did not complete a step.
        earlier: those before it, oldest first.
    """
    where = f"at step {this.step + 1}" if this.trained else "before its first step"
    if this.exit_code == REFUSED:
        return Outcome(GIVE_UP, "the configuration was refused; it would be refused again")
    if this.exit_code == 0 and (
        not this.stop_requested or (progress is not None and progress.finished)
    ):
        done = (
            f"all {progress.total_steps} steps are done"
            if progress and progress.finished
            else "without error"
        )
        return Outcome(FINISHED, done)
    if this.stop_requested:
        standing = [this]
        for attempt in reversed(earlier):
            if not attempt.stop_requested or attempt.checkpoint != this.checkpoint:
                break
            standing.append(attempt)
        if len(standing) >= STANDSTILLS:
            return Outcome(
                GIVE_UP,
                f"{len(standing)} attempts in a row had to stop without a new checkpoint: not "
                "requeued",
            )
        if this.exit_code != 0:
            return Outcome(
                REQUEUE, f"ended {where} with exit code {this.exit_code} after it was asked to stop"
            )
        of = f" of {progress.total_steps}" if progress else ""
        return Outcome(REQUEUE, f"stopped as requested, step {this.step}{of} done")
    if any(a.failed and (a.trained, a.step) == (this.trained, this.step) for a in earlier):
        what = f"at the same step ({this.step + 1})" if this.trained else "before its first step"
        return Outcome(GIVE_UP, f"failed twice {what}: not requeued; see both attempts' logs")
    return Outcome(
        REQUEUE, f"failed {where} with exit code {this.exit_code}, for the first time there"
    )


def read_attempts(history: Path) -> list[Attempt]:
    """Earlier attempts of this run, oldest first.

    A line that is none, as a full disk leaves it, is reported and left out: what has been trained
    does not depend on it.
    """
    if not history.exists():
        return []
    attempts = []
    for number, line in enumerate(_text(history).splitlines(), start=1):
        try:
            attempts.append(Attempt(**json.loads(line)))
        except (TypeError, ValueError, RecursionError):
            _warn(f"{history}: line {number} is no attempt and is left out")
    return attempts


def newest_checkpoint(checkpoints: Path) -> int:
    """The step that verl's tracker names; 0 without one, or with one that names none."""
    tracker = checkpoints / TRACKER
    text = _text(tracker).strip() if tracker.exists() else "0"
    if not re.fullmatch(r"[0-9]{1,18}", text):
        _warn(f"{tracker}: {text[:40]!r} is no step, taken as 0; write the newest one there")
        return 0
    return int(text)


def _undamaged(read: Callable[[], Progress | None]) -> Progress | None:
    """Return what ``read`` does; None with a warning if the file is damaged."""
    try:
        return read()
    except (ValueError, OSError) as error:
        _warn(str(error))
        return None


def _remember(history: Path, attempt: Attempt) -> None:
    """Append one line, on a line of its own even if the last one was cut off."""
    cut = history.exists() and _text(history)[-1:] not in ("", "\n")
    try:
        with history.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + json.dumps(asdict(attempt)) + "\n")
    except OSError as error:
        _warn(f"{history}: {error.strerror}; a failure at the same step will be tried once more")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError as error:
        _warn(f"{path}: {error.strerror}")
        return ""


def _warn(text: str) -> None:
    print(f"WARNING: {text}")  # in order with what main prints


def main(argv: Sequence[str] | None = None) -> int:
    """Print the action on one line and the reason on the next."""
    parser = argparse.ArgumentParser(prog="python -m capo_verl.launch.outcome", description=__doc__)
    parser.add_argument("--checkpoints", required=True, type=Path, help="trainer.default_local_dir")
    parser.add_argument(
        "--before",
        required=True,
        type=Path,
        help="copy of progress.json from before the attempt, or no file",
    )
    parser.add_argument(
        "--resumed-from", required=True, type=int, help="newest checkpoint before the attempt, or 0"
    )
    parser.add_argument("--history", required=True, type=Path, help="file that remembers attempts")
    parser.add_argument("--attempt", required=True, help="name of this attempt")
    parser.add_argument("--exit-code", required=True, type=int)
    parser.add_argument("--stop-requested", action="store_true")
    args = parser.parse_args(argv)
    now = _undamaged(lambda: Progress.read(args.checkpoints))
    before = _undamaged(lambda: Progress.read_file(args.before))
    progress = None if now == before else now
    this = Attempt(
        args.attempt,
        args.exit_code,
        args.stop_requested,
        trained=progress is not None,
        step=progress.step if progress else args.resumed_from,
        checkpoint=newest_checkpoint(args.checkpoints),
    )
    outcome = decide(this, progress, read_attempts(args.history))
    if outcome.action != FINISHED:
        _remember(args.history, this)
    print(outcome.action)
    print(outcome.reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
