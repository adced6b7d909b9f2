# SPDX-License-Identifier: Apache-2.0
"""The process that judges answers: a JSON request per line on stdin, a reply on stdout.

``python -m capo_verl.data.rewards.worker math`` or ``... reasoning_gym``. It is killed when it
takes too long (``pool.py``).
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

PR_SET_PDEATHSIG = 1
"""Number of Linux' ``prctl`` by which a process asks for a signal at its parent's end."""
ORPHAN_SECONDS = 60.0
"""An answer that takes this long ends the worker even if nobody is left to kill it."""

Request = dict[str, Any]


def math(request: Request) -> float:
    """1 if ``request["answer"]`` equals ``request["reference"]``, else 0."""
    from capo_verl.data.rewards.equivalence import equal

    return float(equal(request["reference"], request["answer"]))


def explain(request: Request) -> list[str]:
    """Lines that say how the answer is compared with the reference."""
    from capo_verl.data.rewards.equivalence import explain as lines

    return list(lines(request["reference"], request["answer"]))


def reasoning_gym(request: Request) -> float:
    """reasoning-gym's score of ``request["answer"]``, in [0, 1]."""
    from capo_verl.data.gym import compute_score

    extra = {"entry": request["entry"]}
    source, answer, reference = (request[key] for key in ("data_source", "answer", "reference"))
    return compute_score(source, answer, reference, extra)["score"]


def _start_math() -> Callable[[Request], float]:
    from capo_verl.data.rewards.guard import guard_sympy

    guard_sympy()
    # The first answer of a kind imports parts of sympy and builds the parser's tables: not at the
    # cost of a real answer.
    for pair in (
        ("\\frac{1}{2}", "0.5"),
        ("\\sqrt{8}", "2\\sqrt2"),
        ("[0,1)", "0\\le x<1"),
        ("\\{1,2\\}", "2,1"),
        ("x^2+2x+1", "(x+1)^2"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "1"),
    ):
        math({"reference": pair[0], "answer": pair[1]})
    return math


def _start_reasoning_gym() -> Callable[[Request], float]:
    from capo_verl.data.rewards.guard import guard_reasoning_gym, guard_sympy

    guard_sympy()
    import reasoning_gym as package

    guard_reasoning_gym()
    package.get_score_answer_fn("letter_counting")
    return reasoning_gym


KINDS: dict[str, Callable[[], Callable[[Request], float]]] = {
    "math": _start_math,
    "reasoning_gym": _start_reasoning_gym,
}


def main(kind: str) -> None:
    """Answer requests until stdin is closed.

    What judges is a fork of this process, which has imported all it needs: one that was killed is
    replaced in milliseconds.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed must not look like a reply

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    logging.disable(logging.WARNING)
    try:
        judge = KINDS[kind]()
    except ImportError as error:
        reply(failed=f"{error.name or error} is missing")
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    gc.freeze()  # forks share these objects
    while True:
        child = os.fork()
        if child == 0:
            _end_with(os.getppid())
            _serve(judge, reply)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return


def _end_with(parent: int) -> None:
    """Let the kernel end this process when ``parent`` ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _serve(judge: Callable[[Request], float], reply: Callable[..., None]) -> None:
    from capo_verl.data.rewards.guard import RefusedError, confine

    confine()
    reply(ready=True, pid=os.getpid())
    for line in _lines(0):
        signal.setitimer(signal.ITIMER_REAL, ORPHAN_SECONDS)
        refused = RefusedError.count
        request = json.loads(line)
        try:
            score = judge(request)
            reply(
                id=request["id"],
                score=score,
                refused="" if score or RefusedError.count == refused else "refused",
                steps=explain(request) if request.get("explain") else [],
            )
        except MemoryError:
            reply(id=request["id"], score=0.0, refused="memory")
        # an answer that cannot be read is a wrong answer; the reason is counted and reported
        except Exception as error:
            reply(id=request["id"], score=0.0, refused=type(error).__name__)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _lines(descriptor: int) -> Iterator[bytes]:
    """Lines as they come, until the end of the file. Not more is read than there is."""
    received = b""
    while chunk := os.read(descriptor, 1 << 16):
        *lines, received = (received + chunk).split(b"\n")
        yield from lines


if __name__ == "__main__":
    main(sys.argv[1])
