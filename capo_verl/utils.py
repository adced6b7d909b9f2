# SPDX-License-Identifier: Apache-2.0
"""Files that other processes read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
"""File in a run's folder of checkpoints that names the step of the newest one; verl writes it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields where to write a file that is to be at ``path`` whole or not at all: after an
    exception what was there still is.

    Raises:
        OSError: naming the file, if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:
        if e.errno is None:  # a library's own, with nothing but its message
            raise OSError(f"{path}: {e}") from e
        # A write that finds no room names no file, and the temporary one is nobody's business.
        if e.filename is None or (e.filename == str(temporary) and e.filename2 is None):
            e.filename = str(path)
        raise
    finally:
        if temporary.exists():
            temporary.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
