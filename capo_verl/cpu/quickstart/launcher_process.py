# SPDX-License-Identifier: Apache-2.0
"""A launcher with everything it starts: its own session, its output in a log file, stopped as a
whole.

``python -m capo_verl.cpu.quickstart.launcher_process SESSION`` is its leash: it stops the session
as soon as its standard input is closed, however the process that held the other end has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import final

PATIENCE = 15.0
"""Seconds to wait for the command to end by itself, then for its session to do so, before killing
what is left.
"""


@final
class LauncherProcess:
    """Context manager around a running command; leaving it stops whatever of it is still alive.

    Args:
        command: program and arguments.
        environment: its whole environment.
        log: file that receives its standard output and error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._command, self._environment = command, environment

    def __enter__(self) -> LauncherProcess:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C reaches us alone; and Ray's processes are known by their session
                start_new_session=True,
            )
        self._leash = subprocess.Popen(
            [sys.executable, "-m", __name__, str(self._process.pid), str(PATIENCE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._leash.kill()
        self._leash.communicate()

    def running(self) -> bool:
        """True while the command itself runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Exit code of the command, as a shell reports it (128 + signal)."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Terminate the command, which lets Ray's driver shut its cluster down; then whatever is
        left of its session.
        """
        stop_session(self._process.pid, self.running, PATIENCE)


def stop_session(leader: int, running: Callable[[], bool], patience: float) -> None:
    """Stop a session.

    SIGTERM, not SIGINT: a process started in the background by a shell ignores the latter.

    Args:
        leader: process that began the session; it is terminated first.
        running: whether it still runs.
        patience: seconds to wait after each signal.
    """
    if running():
        _send([leader], signal.SIGTERM)
        _wait_until(lambda: not running(), patience)
    for number in (signal.SIGTERM, signal.SIGKILL):
        _send(_session(leader), number)
        if _wait_until(lambda: not running() and not _session(leader), patience):
            return


def _session(leader: int) -> list[int]:
    """Processes of a session that are not zombies."""
    import psutil

    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            same = os.getsid(process.pid) == leader
        except (ProcessLookupError, PermissionError):
            continue
        if same and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def main(leader: int, patience: float) -> None:
    """Wait for the end of standard input, then stop the session."""
    sys.stdin.buffer.read()
    stop_session(leader, lambda: leader in _session(leader), patience)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
