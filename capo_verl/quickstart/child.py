# SPDX-License-Identifier: Apache-2.0
"""A child process with everything it starts: its own session, its output in a log file, stopped as a whole."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import final

STOP_SIGNALS = ((signal.SIGINT, 20.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))
"""What to send, and how many seconds to wait before the next. On SIGINT verl's driver shuts Ray down by itself."""


@final
class Child:
    """Context manager around a running command; leaving it stops whatever of it is still alive.

    Args:
        command: program and arguments.
        environment: its whole environment.
        log: file that receives its standard output and error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._command, self._environment = command, environment

    def __enter__(self) -> Child:
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone; and Ray's processes are known by their session
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def running(self) -> bool:
        """Whether the command itself still runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Exit code of the command, as a shell reports it (128 + signal)."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Interrupt, then terminate, then kill the command and all processes of its session."""
        for number, patience in STOP_SIGNALS:
            targets = [self._process.pid] if number == signal.SIGINT and self.running() else self._session()
            for pid in targets:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended meanwhile
                    os.kill(pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if not self.running() and not self._session():
                    return
                time.sleep(0.1)

    def _session(self) -> list[int]:
        """Processes of the child's session that are not zombies."""
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
