# SPDX-License-Identifier: Apache-2.0
"""One sentence on standard error for input that a command cannot work with."""

from __future__ import annotations

import sys

from capo_verl.plugin.state import REFUSED


def refuse(command: str, problem: str | BaseException) -> int:
    """Print what is wrong on one line; returns the exit code.

    Args:
        command: name of the sub-command.
        problem: the sentence, or an error with it.
    """
    print(f"capo-verl {command}: {' '.join(str(problem).split())}", file=sys.stderr)
    return REFUSED
