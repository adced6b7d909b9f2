# SPDX-License-Identifier: Apache-2.0
"""A run's start, and its end if that was a failure, as a log of verl and Ray tells them."""

from __future__ import annotations

import re

MAX_LINES = 40
MAX_WIDTH = 240
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_RAY_PREFIX = re.compile(r"^\([^()]*pid=\d+[^()]*\) ?")
_RAY_WRAPPER = "ray.exceptions.RayTaskError"
_TRACEBACK = "Traceback (most recent call last):"

# Lines verl and Ray print on the way to the first rollout, with the share of the start-up time that
# has passed by then.
MILESTONES = (
    ("All configuration checks passed", 0.10, "starting Ray"),
    ("Started a local Ray instance", 0.20, "importing verl"),
    ("Total training steps:", 0.35, "starting the Megatron ranks"),
    ("create worker group", 0.40, "building the model on two ranks"),
    ("model engine initialized", 0.70, "starting the rollout server"),
    ("checkpoint engine manager initialized", 0.80, "starting the agent loop"),
    ("Creating file logger", 0.90, "validation before training"),
)


def startup_fraction(log: str) -> tuple[float, str]:
    """Share of the start-up that is done (0..1), and what it is doing."""
    fraction, doing = 0.02, "importing verl"
    for marker, at, then in MILESTONES:
        if marker in log:
            fraction, doing = at, then
    return fraction, doing


def failure_report(log: str) -> list[str]:
    """The first traceback of the log, or its last lines if there is none.

    The first, because verl answers a failure in one process with a chain of unrelated errors in the
    others.
    """
    lines = [_ANSI.sub("", line).rstrip() for line in log.splitlines()]
    lines = [line if len(line) <= MAX_WIDTH else line[: MAX_WIDTH - 4] + " ..." for line in lines]
    blocks = [block for block in _tracebacks(lines) if not _is_noise(block)]
    if blocks:
        first = _innermost(blocks[0])
        return first if len(first) <= MAX_LINES else [*first[:2], "...", *first[-(MAX_LINES - 3) :]]
    return [line for line in map(_strip_prefix, lines) if line][-15:]


def _tracebacks(lines: list[str]) -> list[list[str]]:
    """Each traceback with the line before it (which names what failed) and its exception; lines of
    other processes that Ray interleaved are skipped.
    """
    found = []
    for start, line in enumerate(lines):
        if _TRACEBACK not in line:
            continue
        prefix = _prefix(line)
        same = [_strip_prefix(other) for other in lines[start:] if _prefix(other) == prefix]
        end = next(
            (i for i, other in enumerate(same) if i > 0 and _is_exception(other)), len(same) - 1
        )
        before = [_strip_prefix(other) for other in lines[:start] if _prefix(other) == prefix][-1:]
        found.append(before + same[: end + 1])
    return found


def _is_exception(line: str) -> bool:
    """True if a traceback ends here: the exception's own line, at the margin.

    Ray's wrapper goes on with its cause.
    """
    return bool(line) and not line[0].isspace() and not line.startswith(_RAY_WRAPPER)


def _innermost(block: list[str]) -> list[str]:
    """The part of a chain of Ray calls that happened in the process that failed."""
    wrappers = [i for i, line in enumerate(block) if line.startswith(_RAY_WRAPPER)]
    return block[wrappers[-1] :] if wrappers else block


def _is_noise(block: list[str]) -> bool:
    return "KeyboardInterrupt" in block[-1] or "SystemExit" in block[-1]


def _prefix(line: str) -> str:
    match = _RAY_PREFIX.match(line)
    return match.group(0).strip() if match else ""


def _strip_prefix(line: str) -> str:
    return _RAY_PREFIX.sub("", line)
