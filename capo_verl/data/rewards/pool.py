# SPDX-License-Identifier: Apache-2.0
"""Worker processes that judge answers, within limits of time and memory that hold.

An answer that breaks a limit costs the process that judges; the next one gets a fresh fork.

verl calls a reward function in threads of a Ray actor. Neither can a thread be stopped, nor does
math-verify's own time limit (``signal.alarm``) work in one. Workers are plain child processes that
speak JSON over pipes, so that nothing they send is ever unpickled.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

START_SECONDS = 120.0
"""Seconds for importing sympy or reasoning-gym on a machine that is busy."""
DIED, NOT_STARTED = ELSEWHERE = ("died", "not started")
"""Troubles that are not the answer's: it is tried once more, and its verdict is not remembered."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of judging one answer."""

    score: float
    trouble: str = ""
    """Reason that the score is 0, or empty.

    ``timeout``, ``died``, ``memory``, ``not started``, or the class of the error that the answer
    caused.
    """
    steps: tuple[str, ...] = ()
    """How the answer was compared, line by line, if the request asked for it (``explain``)."""


class NotReadyError(Exception):
    """Raised for a worker that ended before it was ready, or was not ready in time."""


class DiedError(Exception):
    """Raised when the process that judges has ended, by itself or by somebody else."""


class _Worker:
    """A process that imports once, and its fork that judges (``worker.py``)."""

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
        self._received = b""
        self._requests = 0
        self.pid = 0
        hello = self._receive(START_SECONDS)
        if hello is None or not self._is_hello(hello):
            self.kill()
            if hello is None:
                raise NotReadyError
            raise RuntimeError(
                f"the process that judges answers ({kind}) did not start: {hello['failed']}; "
                f"pip install 'capo-verl[data]', or run: {_by_hand(kind)}"
            )

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply to one request; None if there is none in time.

        Raises:
            DiedError: if what judges has ended.
        """
        while (waiting := self._receive(0.0)) is not None:
            self._is_hello(waiting)  # of the successor of one that ended while it was idle
        self._requests += 1
        deadline = time.monotonic() + seconds
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(
                json.dumps({**request, "id": self._requests}).encode() + b"\n"
            )
            self._process.stdin.flush()
        except BrokenPipeError:
            raise DiedError from None
        while (reply := self._receive(deadline - time.monotonic())) is not None:
            if self._is_hello(reply):
                raise DiedError
            if reply["id"] == self._requests:
                return reply
        if self.has_ended():
            raise DiedError
        return None

    def replace(self) -> bool:
        """End what judges; its successor is a fork. False if there is none in time."""
        os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + START_SECONDS
        while (reply := self._receive(deadline - time.monotonic())) is not None:
            if self._is_hello(reply):
                return True
        return False

    def _is_hello(self, reply: dict[str, Any]) -> bool:
        self.pid = reply.get("pid", self.pid)
        return "ready" in reply

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._received:
            poll = select.poll()  # not select(): Ray's actors have more than 1,024 open files
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return None
            self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)

    def has_ended(self) -> bool:
        """True if the process has ended, not only failed to answer.

        Its pipe closes a little before the process can be waited for.
        """
        assert self._process.stdout is not None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        return any(event & select.POLLHUP for _, event in poll.poll(0))

    def kill(self) -> None:
        """End the process, and with it what judges."""
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
        self._warned = False
        self._lock = threading.Lock()
        atexit.register(self.close)

    def judge(self, request: dict[str, Any], seconds: float) -> Verdict:
        """Score of one request.

        ``seconds`` limits the time of judging alone, without that of waiting for a worker.

        A worker that ends, or does not start in time, is replaced once.

        Raises:
            RuntimeError: if a worker says that it cannot start: a package is missing.
        """
        verdict = self._judge_once(request, seconds)
        # A busy machine, or one short of memory, says nothing about the answer.
        if verdict.trouble in ELSEWHERE:
            verdict = self._judge_once(request, seconds)
        if verdict.trouble == NOT_STARTED and not self._warned:
            self._warned = True
            logger.warning(
                "no process that judges answers (%s) was ready within %g s, twice: the answer "
                "scores 0 with judge_failed=1, and so will others; to see why, run: %s",
                self.kind, START_SECONDS, _by_hand(self.kind),
            )  # fmt: skip
        return verdict

    def _judge_once(self, request: dict[str, Any], seconds: float) -> Verdict:
        worker = self._idle.get()
        try:
            if worker is None:
                try:
                    worker = _Worker(self.kind)
                except NotReadyError:
                    return Verdict(0.0, NOT_STARTED)
                with self._lock:
                    self._workers.add(worker)
            try:
                reply = worker.ask(request, seconds)
            except DiedError:
                if worker.has_ended():
                    self._discard(worker)
                    worker = None
                return Verdict(0.0, DIED)
            if reply is None:
                if not worker.replace():
                    self._discard(worker)
                    worker = None
                return Verdict(0.0, "timeout")
            return Verdict(reply["score"], reply.get("refused", ""), tuple(reply.get("steps", ())))
        finally:
            self._idle.put(worker)

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        with self._lock:
            self._workers.discard(worker)

    def pids(self) -> list[int]:
        """Processes that judge now."""
        with self._lock:
            return sorted(worker.pid for worker in self._workers)

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            workers, self._workers = self._workers, set()
        for worker in workers:
            worker.kill()


def _by_hand(kind: str) -> str:
    return f"{sys.executable} -m capo_verl.data.rewards.worker {kind}"


def pool(kind: str, size: int) -> Pool:
    """This process's pool. A forked child gets its own: pipes cannot be shared."""
    return _pool(kind, size, os.getpid())


@cache
def _pool(kind: str, size: int, pid: int) -> Pool:
    return Pool(kind, size)
