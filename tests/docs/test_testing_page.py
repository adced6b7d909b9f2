# SPDX-License-Identifier: Apache-2.0
"""docs/testing.md names every folder of tests/, every marker, every variable of scripts/test.sh,
and files that exist.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


def first_cells(heading: str) -> list[str]:
    """Code in the first cells of the table whose header begins with ``heading``."""
    table = TEXT.split(f"| {heading} |")[1].split("\n\n")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def folders(tests: Path) -> list[str]:
    """Those with something in them."""
    found = [p for p in tests.iterdir() if p.is_dir() and p.name != "__pycache__"]
    return sorted(
        p.name for p in found if any(x.is_file() and x.suffix != ".pyc" for x in p.rglob("*"))
    )


def test_every_folder_is_named_once() -> None:
    assert first_cells("folder of `tests/`") == folders(ROOT / "tests")


def test_an_empty_folder_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "old/__pycache__").mkdir(parents=True)
    (tmp_path / "old/__pycache__/x.pyc").touch()
    (tmp_path / "new").mkdir()
    (tmp_path / "new/test_x.py").touch()
    assert folders(tmp_path) == ["new"]


def test_every_marker_is_named() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    markers = [
        line.split(":")[0] for line in settings["tool:pytest"]["markers"].strip().splitlines()
    ]
    assert sorted(first_cells("marker")) == sorted(markers)


def test_every_variable_of_the_script_is_named() -> None:
    scripts = [
        (ROOT / "scripts" / name).read_text(encoding="utf-8")
        for name in ("test.sh", "environment.sh")
    ]
    used = set(re.findall(r"\$\{([A-Z_]+):?-", "".join(scripts))) - {"PYTHONPATH"}
    assert set(first_cells("variable")) == used


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`((?:tests|docs|scripts|capo_verl|\.ci)/[\w./-]+)`", TEXT)))
)
def test_files_exist(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("tests/engines/megatron/test_layouts.py",
            ["CASES", "TOLERANCE", "CAPO_VERL_WRITE_MATRIX"]),
        ("tests/engines/megatron/test_layouts.py",
            ["def test_documented_matrix_is_of_these_layouts"]),
        ("tests/helpers/grouped.py", ["launch_by_size"]),
        ("tests/helpers/spawn.py", ["run_on_ranks"]),
        ("tests/cpu/megatron/engine_cases.py", ["class Layout", "def make_engine"]),
        ("tests/engines/fsdp/test_engine.py", ["LAYOUTS"]),
        ("tests/conftest.py", ["ALONE"]),
    ],
)  # fmt: skip
def test_names_are_those_of_the_tests(file: str, names: list[str]) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert [name for name in names if name not in text or name.split()[-1] not in TEXT] == []


def test_the_recorded_batch_is_as_described() -> None:
    from tests.helpers.recording import LEARNING_RATES, PROMPTS, RecordedBatch

    text = " ".join(TEXT.split())
    assert "eight sequences, 55 response tokens, two optimizer steps" in text
    assert (len(PROMPTS), RecordedBatch.make().tokens, len(LEARNING_RATES)) == (8, 55, 2)
    assert "six cases" in text and len(list((ROOT / "tests/golden").glob("*.npz"))) == 6
