# SPDX-License-Identifier: Apache-2.0
"""Dependencies point the way docs/architecture.md says."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "capo_verl"
CONFIG = {
    "capo_verl.config",
    "capo_verl.config.kl_budget",
    "capo_verl.config.checks",
    "capo_verl.config.rivals",
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, at its top or inside functions; those for type checkers left
    out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}


def outside(path: Path, *allowed: str) -> set[str]:
    return {
        name
        for name in imports(path)
        if not any(name == a or name.startswith(a + ".") for a in allowed)
    }


def python_files(folder: str) -> list[Path]:
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files, f"no Python files in {folder}: a folder that was moved would hold to everything"
    return files


def test_the_method_imports_torch_and_its_own_configuration_only() -> None:
    files = python_files("core")
    assert len(files) > 20
    allowed = ("torch", "triton", "capo_verl.core", *CONFIG)
    assert {str(f.relative_to(ROOT)): bad for f in files if (bad := outside(f, *allowed))} == {}


def test_only_one_file_of_the_method_communicates() -> None:
    users = {
        f.name for f in python_files("core") if any("torch.distributed" in i for i in imports(f))
    }
    assert users == {"collectives.py"}


def test_the_configuration_imports_nothing() -> None:
    # verl's dataclass is behind a lazy import of config.py.
    lazy = {"capo_verl.plugin.policy_loss.CapoPolicyLossConfig"}
    for name in CONFIG:
        assert outside(ROOT / f"{name.replace('.', '/')}.py", *CONFIG) <= lazy


def test_rivals_need_torch_only() -> None:
    for path in python_files("algorithms/rivals"):
        assert outside(path, "torch", "capo_verl.rivals", *CONFIG) == set(), path.name


def test_nothing_depends_on_the_embedded_default() -> None:
    """Deleting cpu/ would not touch the method nor the engines: verl's registry and the plugin load
    it by name.
    """
    for folder in ("core", "megatron", "fsdp", "algorithms", "rewards", "data"):
        for path in python_files(folder):
            assert not [i for i in imports(path) if i.startswith("capo_verl.cpu")], path
