# SPDX-License-Identifier: Apache-2.0
"""A launcher with everything it starts: its own session, its output in a log file, stopped as a
whole.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
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
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

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

        SIGTERM, not SIGINT: a process started in the background by a shell ignores the latter.
        """
        if self.running():
            _send([self._process.pid], signal.SIGTERM)
            _wait_until(lambda: not self.running(), PATIENCE)
        for number in (signal.SIGTERM, signal.SIGKILL):
            _send(self._session(), number)
            if _wait_until(lambda: not self.running() and not self._session(), PATIENCE):
                return

    def _session(self) -> list[int]:
        """Processes of the command's session that are not zombies."""
        import psutil

        found = []
        for process in psutil.process_iter(["pid", "status"]):
            try:
                same = os.getsid(process.pid) == self._process.pid
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
