# SPDX-License-Identifier: Apache-2.0
"""One sentence on standard error for input that a command cannot work with."""

from __future__ import annotations

import sys

from capo_verl.plugin.state import REFUSED


def refuse(command: str, problem: str | BaseException) -> int:
    """Print what is wrong on one line, control characters as escapes; returns the exit code.

    Args:
        command: name of the sub-command.
        problem: the sentence, or an error with it.
    """
    sentence = "".join(
        character if character.isprintable() else repr(character)[1:-1]
        for character in " ".join(str(problem).split())
    )
    print(f"capo-verl {command}: {sentence}", file=sys.stderr)
    return REFUSED
