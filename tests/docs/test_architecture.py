# SPDX-License-Identifier: Apache-2.0
"""Dependencies point the way docs/architecture.md says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import architecture
from tests.architecture import PACKAGE, imports, modules, outside, room


def test_imports_go_down_and_never_in_a_circle() -> None:
    assert architecture.problems() == []


def test_every_room_is_in_the_table() -> None:
    assert {room(name) for name in modules()} == set(architecture.ALLOWED)
    assert not any("experiments" in allowed for allowed in architecture.ALLOWED.values())


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package that the table is asked about, instead of the package."""
    folder = tmp_path / "capo_verl"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(architecture, "PACKAGE", folder)
    for cached in (modules, imports):
        cached.cache_clear()
    yield folder
    for cached in (modules, imports):
        cached.cache_clear()


def test_a_forbidden_import_a_circle_and_one_entry_too_many_are_seen(copy: Path) -> None:
    (copy / "core" / "chunks.py").write_text("from capo_verl.experiments.study import grid\n")
    (copy / "config" / "checks.py").write_text("def f():\n    from capo_verl.config import capo\n")
    (copy / "loose.py").touch()
    problems = "\n".join(architecture.problems())
    assert (
        "capo_verl.core.chunks imports capo_verl.experiments.study.grid: core may not import "
        "experiments" in problems
    )
    assert "rooms import each other: " in problems
    assert "modules import each other: capo_verl.config.capo, capo_verl.config.checks, " in problems
    assert "capo_verl/ holds 16 entries, at most 15 are allowed" in problems
    assert architecture.main() == 1


def test_the_method_imports_torch_and_its_own_configuration_only() -> None:
    allowed = {"core": ("torch", "triton"), "rivals": ("torch",), "config": (), "utils": ()}
    for name, path in modules().items():
        if room(name) in allowed:
            own = ("capo_verl.config", f"capo_verl.{room(name)}")
            assert outside(path, *allowed[room(name)], *own) == set(), name


def test_only_one_file_of_the_method_communicates() -> None:
    users = {
        name
        for name, path in modules().items()
        if room(name) == "core" and any("torch.distributed" in i for i in imports(path))
    }
    assert users == {"capo_verl.core.collectives"}


@pytest.mark.parametrize("folder", ["plugin", "engines", "commands"])
def test_a_room_of_the_plugin_does_nothing_when_it_is_imported(folder: str) -> None:
    text = (PACKAGE / folder / "__init__.py").read_text()
    assert [line for line in text.splitlines() if not line.startswith("#")] == []
