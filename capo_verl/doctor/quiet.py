# SPDX-License-Identifier: Apache-2.0
"""Standard output belongs to the report: what verl, Ray and compilers print goes to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Both Python's ``sys.stdout`` and the file descriptor, which C libraries and child processes write to."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
