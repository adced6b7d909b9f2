# SPDX-License-Identifier: Apache-2.0
"""A module run in a process of its own: it may crash, hang or take its time without the other
checks noticing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from capo_verl.commands.doctor.check import Broken

GRACE = 10.0
"""Seconds between asking a process to end and killing it."""


def last_line(text: str) -> str:
    """The last line of a text that is not empty, such as the message of a traceback; "" if all
    are.
    """
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


class AnsweringProcess:
    """``python -m MODULE ARGUMENT...``, started at once; its answer is the JSON on the last line
    that it prints.

    A context manager: at its end the process is stopped.

    Args:
        environment: of the process; must not change afterwards.
    """

    def __init__(self, module: str, *arguments: str, environment: Mapping[str, str]):
        # Files: nobody reads a pipe before the answer is asked for.
        with ExitStack() as files:
            self._stdout, self._stderr = (
                files.enter_context(tempfile.TemporaryFile()) for _ in range(2)
            )
            self._files = files.pop_all()
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *arguments],
            env=dict(environment), stdin=subprocess.DEVNULL, stdout=self._stdout,
            stderr=self._stderr,
        )  # fmt: skip

    def answer(self, timeout: float) -> Any:
        """Wait for it.

        Args:
            timeout: seconds.

        Raises:
            Broken: if the process fails or is not done in time, with what it said last.
        """
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            raise Broken(
                f"no answer within {timeout:g} s (it said last: {self._said() or 'nothing'})"
            ) from None
        if code != 0:
            raise Broken(f"{self._said() or 'nothing said'} (exit code {code})")
        self._stdout.seek(0)
        return json.loads(last_line(self._stdout.read().decode(errors="replace")))

    def stop(self) -> None:
        """End the process if it is running."""
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _said(self) -> str:
        self._stderr.seek(0)
        return last_line(self._stderr.read().decode(errors="replace"))

    def __enter__(self) -> AnsweringProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.stop()
        self._files.close()
