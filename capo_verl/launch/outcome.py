# SPDX-License-Identifier: Apache-2.0
"""``python -m capo_verl.launch.outcome``: what a batch job should do now that its driver has ended.

A run that was asked to stop is continued. One that failed is tried again, unless it failed before at the same step: then the
cause is not the machine. What was refused as a configuration (exit code 2) would be refused again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from capo_verl.launch.progress import Progress

REFUSED = 2
"""Exit code of a run whose configuration was refused before it started."""
FINISHED, REQUEUE, GIVE_UP = "finished", "requeue", "give up"


@dataclass(frozen=True)
class Failure:
    """One attempt that failed; a line of the history file."""

    attempt: str
    step: int
    """The last step that was completed, by this or an earlier attempt; 0 before the first."""
    exit_code: int


@dataclass(frozen=True)
class Outcome:
    action: str
    """FINISHED, REQUEUE or GIVE_UP."""
    reason: str


def read_failures(history: Path) -> list[Failure]:
    """Earlier failures of this run, oldest first."""
    if not history.exists():
        return []
    return [Failure(**json.loads(line)) for line in history.read_text().splitlines()]


def decide(
    exit_code: int, progress: Progress | None, stop_requested: bool, failures: Sequence[Failure]
) -> tuple[Outcome, Failure | None]:
    """What to do, and the failure to remember, if it was one.

    Args:
        exit_code: of the driver, or of what failed before it.
        progress: what the run wrote about itself, None if it has not completed a step.
        stop_requested: whether the job was warned.
        failures: earlier ones.
    """
    step = progress.step if progress else 0
    if exit_code == 0:
        if progress is not None and progress.finished:
            return Outcome(FINISHED, f"all {progress.total_steps} steps are done"), None
        if stop_requested:
            done = f"step {step} of {progress.total_steps}" if progress else "nothing"
            return Outcome(REQUEUE, f"stopped as requested, {done} done"), None
        return Outcome(FINISHED, "the driver ended without error"), None
    if exit_code == REFUSED:
        return Outcome(GIVE_UP, "the configuration was refused; it would be refused again"), None
    failure = Failure("", step, exit_code)
    if any(earlier.step == step for earlier in failures):
        return Outcome(
            GIVE_UP, f"failed twice at the same step ({step + 1}): not requeued; see both attempts' logs"
        ), failure
    return Outcome(REQUEUE, f"failed at step {step + 1} with exit code {exit_code}, for the first time there"), failure


def main(argv: Sequence[str] | None = None) -> int:
    """Print the action on one line and the reason on the next."""
    parser = argparse.ArgumentParser(prog="python -m capo_verl.launch.outcome", description=__doc__)
    parser.add_argument("--checkpoints", required=True, type=Path, help="trainer.default_local_dir")
    parser.add_argument("--history", required=True, type=Path, help="file that remembers failures")
    parser.add_argument("--attempt", required=True, help="name of this attempt")
    parser.add_argument("--exit-code", required=True, type=int)
    parser.add_argument("--stop-requested", action="store_true")
    args = parser.parse_args(argv)
    outcome, failure = decide(
        args.exit_code, Progress.read(args.checkpoints), args.stop_requested, read_failures(args.history)
    )
    if failure is not None:
        with args.history.open("a") as file:
            file.write(json.dumps({**asdict(failure), "attempt": args.attempt}) + "\n")
    print(outcome.action)
    print(outcome.reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
