# SPDX-License-Identifier: Apache-2.0
"""Limits of a process that judges answers, whatever the answers contain.

They are installed in the workers only.

Answers come from a model that is rewarded for whatever the judge accepts. math-verify's parser of
plain expressions and some of reasoning-gym's scorers hand them to Python's ``eval``, directly or by
sympy's ``parse_expr``. Here ``eval`` becomes ``ast.literal_eval``, ``parse_expr`` takes nothing but
arithmetic, and an audit hook refuses processes, sockets and writing.
"""

from __future__ import annotations

import ast
import os
import re
import resource
import sys
from typing import Any, NoReturn

ADDRESS_SPACE = 2 << 30
"""Bytes that a worker may map, what it starts with included (0.3 GiB)."""

NAME = re.compile(r"[^\W\d]\w*")
NAMES = frozenset(
    (
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "asin",
        "acos",
        "atan",
        "acot",
        "sinh",
        "cosh",
        "tanh",
        "asinh",
        "acosh",
        "atanh",
    )
    + ("exp", "log", "ln", "sqrt", "cbrt", "abs", "Abs", "pi", "oo", "Integral")
)
# Digits, single spaces between tokens, operators, brackets of arithmetic, commas between arguments;
# no quotes, no colons.
EXPRESSION = re.compile(r"[\w\s.+\-*/^(),!=]*")
ATTRIBUTE = re.compile(r"\.\s*[^\W\d]|_|[^\x00-\x7f]")

REFUSED_EVENTS = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile",
    "os.kill", "os.killpg", "subprocess.Popen", "pty.spawn", "socket.", "os.remove", "os.rename",
    "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.putenv", "shutil.", "ctypes.", "urllib.", "ftplib.", "smtplib.", "tempfile.",
)  # fmt: skip

EVALUATING_SCORERS = (
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
"""Modules of reasoning-gym 0.1.25 whose scorers call ``eval`` on the answer, to read a list."""


class RefusedError(ValueError):
    """An answer that would have to be evaluated, or that tried to reach outside."""

    count = 0
    """Number of such answers in this process: the code that judges may swallow the error."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        RefusedError.count += 1


def check_expression(text: str) -> None:
    """Refuse text that sympy would have to evaluate.

    Raises:
        RefusedError: unless ``text`` is arithmetic: numbers, operators, variables of one letter,
            and known functions; or a single name, which calls nothing (sympy's own modules make
            symbols that way).
    """
    if text.isascii() and text.isalnum() and text[0].isalpha():
        return
    if not EXPRESSION.fullmatch(text) or ATTRIBUTE.search(text):
        raise RefusedError("the answer has characters that no arithmetic expression has")
    unknown = [name for name in NAME.findall(text) if len(name) > 1 and name not in NAMES]
    if unknown:
        raise RefusedError(
            f"the answer has names that are no functions of arithmetic: {unknown[0][:20]}"
        )


def guard_sympy() -> None:
    """Replace sympy's ``parse_expr`` wherever it is reached by name.

    To be called before anything else imports it.
    """
    import sympy
    import sympy.parsing
    import sympy.parsing.sympy_parser as parser

    original = parser.parse_expr

    def parse_expr(s: str, *args: Any, **kwargs: Any) -> Any:
        check_expression(str(s))
        return original(s, *args, **kwargs)

    parser.parse_expr = sympy.parsing.parse_expr = sympy.parse_expr = parse_expr


def guard_reasoning_gym() -> None:
    """Give the scorers that evaluate an answer a reader of literals instead."""
    from importlib import import_module

    for name in EVALUATING_SCORERS:
        import_module(name).eval = ast.literal_eval  # type: ignore[attr-defined]


def confine() -> None:
    """Limit memory, forbid files, processes and sockets, for the rest of this process's life."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_audit)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event.startswith(REFUSED_EVENTS):
        _refuse(event)
    if event == "open":
        _, mode, flags = args
        writes = isinstance(flags, int) and flags & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        )
        if writes or (isinstance(mode, str) and set(mode) & set("wax+")):
            _refuse("open for writing")


def _refuse(what: str) -> NoReturn:
    raise RefusedError(f"{what} is refused while answers are judged")
