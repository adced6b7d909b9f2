# SPDX-License-Identifier: Apache-2.0
"""docs/extending.md does what it says: its files and diffs, applied to a copy of the package, pass
its own assertions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "extending.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# file: (\S+)\n")
RUNNER = """
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import capo_verl

assert Path(capo_verl.__file__).is_relative_to(Path.cwd()), capo_verl.__file__
namespace = {"__name__": "extending"}
blocks = sorted(Path("extending.md").iterdir())
for block in blocks:
    exec(compile(block.read_text(encoding="utf-8"), block, "exec"), namespace)
print("ran", len(blocks))
"""


class Block(NamedTuple):
    """A fenced block of the page."""

    line: int
    language: str
    text: str


def blocks_of(page: str) -> list[Block]:
    return [Block(page[: m.start()].count("\n") + 2, m[1], m[2]) for m in FENCE.finditer(page)]


BLOCKS = blocks_of(PAGE.read_text(encoding="utf-8"))
FILES = [b for b in BLOCKS if b.language == "python" and FILE.match(b.text)]
RUN = [b for b in BLOCKS if b.language == "python" and not FILE.match(b.text)]


def make_copy(folder: Path) -> None:
    """The package with the page's files and diffs."""
    for name in ("capo_verl", "hydra_plugins"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    shutil.copy(Path(__file__).with_name("plain_engine.py"), folder)
    for block in FILES:
        path = folder / FILE.match(block.text)[1]
        assert not path.exists(), f"{path} is there already: name another file in line {block.line}"
        path.write_text(block.text, encoding="utf-8")
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    for block in (b for b in BLOCKS if b.language == "diff"):
        done = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", "-"],
            input=block.text, cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (
            f"docs/extending.md, the diff in line {block.line}: {done.stderr}"
        )


def test_the_page_runs(tmp_path: Path) -> None:
    make_copy(tmp_path)
    (tmp_path / "extending.md").mkdir()
    for block in RUN:  # behind blank lines, so that a traceback has the line numbers of the page
        text = "\n" * (block.line - 1) + block.text
        (tmp_path / "extending.md" / f"{block.line:05d}").write_text(text, encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"ran {len(RUN)}"


@pytest.mark.parametrize(
    "block", [b for b in RUN if "assert" in b.text], ids=lambda b: f"line {b.line}"
)
def test_assertions_are_about_numbers(block: Block) -> None:
    assert re.search(r"assert .*\d", block.text)


def test_every_section_asserts_something() -> None:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    silent = [
        s.splitlines()[0] for s in sections if not any("assert " in b.text for b in blocks_of(s))
    ]
    assert silent == ["What holds it, and the rest"]


def test_files_named_on_the_page_exist() -> None:
    named = set(
        re.findall(
            r"`((?:capo_verl|tests|docs|scripts|examples)/[\w./-]+)`",
            PAGE.read_text(encoding="utf-8"),
        )
    )
    made = {FILE.match(b.text)[1] for b in FILES}
    assert sorted(name for name in named - made if not (ROOT / name).exists()) == []
