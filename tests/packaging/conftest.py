# SPDX-License-Identifier: Apache-2.0
"""The project as a user gets it: an sdist and a wheel, built once, and the wheel in an environment
of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("capo_verl", "hydra_plugins", "tests", "docs", "examples", "scripts", "pyproject.toml",
    "setup.cfg", "MANIFEST.in",
         "README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff")  # fmt: skip
LITTER = ("outputs/run/metrics.jsonl", "data/train.parquet", ".venv/lib/module.py",
    "capo_verl/__pycache__/config.pyc",
          "capo_verl/config/capo.py.orig", "capo_quickstart/log.jsonl")  # fmt: skip
"""What lies about in a checkout that is worked in."""

BUILD = (
    "import sys; from setuptools import build_meta; print(getattr(build_meta, "
    "sys.argv[1])(sys.argv[2]))"
)


def build(kind: str, source: Path, output: Path) -> Path:
    """What ``pip`` and ``build`` do, in this environment instead of a fresh one, which would need a
    network.

    Args:
        kind: ``build_wheel`` or ``build_sdist``.
    """
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(output)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A copy of the checkout, with litter: building leaves folders behind."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, copy / part)
    for name in LITTER:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    return copy


@pytest.fixture(scope="session")
def sdist(source, tmp_path_factory) -> Path:
    return build("build_sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory) -> Path:
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel"))


class Installed(NamedTuple):
    """An environment with the wheel, and the dependencies of the one that runs the tests."""

    python: Path
    site_packages: Path
    empty: Path
    """A folder without files: the working directory."""

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``capo-verl`` of the environment, or its ``python`` with these arguments."""
        words = [str(word) for word in command]
        words = (
            [str(self.python.with_name("capo-verl")), *words[1:]]
            if words[0] == "capo-verl"
            else [str(self.python), *words]
        )
        inherited = {
            k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VERL_PLATFORM")
        }
        return subprocess.run(
            words,
            cwd=self.empty,
            env={**inherited, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Installed:
    """``pip install --no-deps``; the dependencies come by a path entry, which brings no editable
    install with it.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
    ]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()
    return Installed(python, site_packages, folder / "empty")


@pytest.fixture(scope="session")
def without(installed) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a module in the environment as if a package were not installed."""
    helper = Path(__file__).with_name("without.py")

    def run(
        package: str, program: object, *arguments: object, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return installed.run(helper, package, program, *arguments, **environment)

    return run
