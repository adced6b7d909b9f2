# SPDX-License-Identifier: Apache-2.0
"""Worker processes that judge answers, within limits of time and memory that hold.

An answer that breaks a limit costs its worker; the next one gets a fresh process.

verl calls a reward function in threads of a Ray actor. Neither can a thread be stopped, nor does
math-verify's own time limit (``signal.alarm``) work in one. Workers are plain child processes that
speak JSON over pipes, so that nothing they send is ever unpickled.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

START_SECONDS = 120.0
"""Seconds for importing sympy or reasoning-gym on a machine that is busy."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of judging one answer."""

    score: float
    trouble: str = ""
    """Reason that the score is 0, or empty.

    ``timeout``, ``died``, ``memory``, or the class of the error that the answer caused.
    """


class _Worker:
    def __init__(self, kind: str) -> None:
        # The same module search path as here: Ray adds to it in ways that a child process would not
        # inherit.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "capo_verl.data.rewards.worker", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        hello = self._receive(START_SECONDS)
        if hello is None or not hello.get("ready"):
            self.kill()
            reason = (hello or {}).get(
                "failed", f"it ended, or was not ready within {START_SECONDS:.0f} s"
            )
            raise RuntimeError(
                f"the process that judges answers ({kind}) did not start: {reason}; pip install "
                f"'capo-verl[data]', or run: {sys.executable} -m "
                f"capo_verl.data.rewards.worker {kind}"
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply; None if there is none in time, or the process died."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._receive(seconds)

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        descriptor = self._process.stdout.fileno()
        received = b""
        while not received.endswith(b"\n"):
            poll = select.poll()  # not select(): Ray's actors have more than 1,024 open files
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return None
            received += chunk
        return json.loads(received)

    def has_ended(self) -> bool:
        """True if the process has ended, not only failed to answer.

        Its pipe closes a little before the process can be waited for.
        """
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        return any(event & select.POLLHUP for _, event in poll.poll(0))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Pool:
    """Up to ``size`` workers, started when they are first needed. Threads may share it.

    Args:
        kind: of :mod:`capo_verl.data.rewards.worker`.
        size: processes at most.
    """

    def __init__(self, kind: str, size: int) -> None:
        self.kind, self.size = kind, size
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # the last used is warm
        for _ in range(size):
            self._idle.put(None)
        self._workers: set[_Worker] = set()
        self._lock = threading.Lock()
        atexit.register(self.close)

    def judge(self, request: dict[str, Any], seconds: float) -> Verdict:
        """Score of one request.

        ``seconds`` limits the time of judging alone, without that of waiting for a worker.

        Raises:
            RuntimeError: if a worker cannot be started at all.
        """
        verdict = self._judge_once(request, seconds)
        # An idle worker may have been ended by something else, for example for want of memory on
        # the machine.
        return self._judge_once(request, seconds) if verdict.trouble == "died" else verdict

    def _judge_once(self, request: dict[str, Any], seconds: float) -> Verdict:
        worker = self._idle.get()
        try:
            if worker is None:
                worker = _Worker(self.kind)
                with self._lock:
                    self._workers.add(worker)
            reply = worker.ask(request, seconds)
            if reply is not None:
                return Verdict(reply["score"], reply.get("refused", ""))
            trouble = "died" if worker.has_ended() else "timeout"
            worker.kill()
            with self._lock:
                self._workers.discard(worker)
            worker = None
            return Verdict(0.0, trouble)
        finally:
            self._idle.put(worker)

    def pids(self) -> list[int]:
        """Processes that run now."""
        with self._lock:
            return sorted(worker.pid for worker in self._workers)

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill()


def pool(kind: str, size: int) -> Pool:
    """This process's pool. A forked child gets its own: pipes cannot be shared."""
    return _pool(kind, size, os.getpid())


@cache
def _pool(kind: str, size: int, pid: int) -> Pool:
    return Pool(kind, size)
