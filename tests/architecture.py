# SPDX-License-Identifier: Apache-2.0
"""Who imports whom: ``python -m tests.architecture`` prints it and fails on a forbidden import.

``python -m tests.architecture NAME...`` prints the modules in which a knob, an argument or an
attribute of that name occurs.

A room is a folder, or a file, directly in ``capo_verl/``. Imports inside functions count; those for
type checkers do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "capo_verl"
NAME = PACKAGE.name
MAX_ENTRIES = 15

_GROUND = {"utils", "config"}
_METHOD = {*_GROUND, "core", "rivals", "data"}
_ENGINES = {*_METHOD, "plugin"}
_RUNS = {*_ENGINES, "viewer"}
ALLOWED: dict[str, set[str]] = {
    "__init__": {"config", "core"},
    "utils": set(),
    "config": set(),
    "viewer": {"utils"},
    "core": {"config"},
    "rivals": {"config"},
    "data": {"utils"},
    "plugin": {"utils", "config", "core", "rivals", "data"},
    "engines": {"utils", "config", "core", "viewer"},
    "launch": {*_ENGINES},
    "cpu": {*_RUNS, "engines"},
    "commands": {*_RUNS, "engines", "launch", "cpu"},
    "experiments": {*_RUNS, "engines", "launch", "cpu", "commands"},
    "moved": {"config", "data", "rivals"},
}
"""Room -> rooms that it may import, besides ``capo_verl`` itself (its version)."""


@cache
def modules() -> dict[str, Path]:
    """The package's modules by dotted name; a folder's ``__init__`` has the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """Names that a file imports, at its top or in functions, as ``module`` or ``module.name``."""
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
    return frozenset(found)


def outside(path: Path, *allowed: str) -> set[str]:
    """Imports of a file other than the standard library and what begins like ``allowed``."""
    return {
        name
        for name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    }


def module_graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports."""
    return {name: _own(imports(path)) - {name} for name, path in modules().items()}


def _own(names: Iterable[str]) -> set[str]:
    known = modules()
    found = set()
    for name in names:
        parent = name.rpartition(".")[0]
        if name in known:
            found.add(name)
        elif parent in known:
            found.add(parent)
    return found


def room(module: str) -> str:
    """The room in which a module lies."""
    return (module.split(".") + ["__init__"])[1]


def room_graph() -> dict[str, set[str]]:
    """Room -> other rooms that it imports."""
    graph: dict[str, set[str]] = {room(name): set() for name in modules()}
    for name, imported in module_graph().items():
        graph[room(name)] |= {room(other) for other in imported} - {room(name)}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of two or more nodes that reach each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """Room -> floor: one above the highest room that it imports. The graph has no circle."""

    @cache
    def floor(node: str) -> int:
        return max((floor(other) + 1 for other in graph[node]), default=0)

    return {node: floor(node) for node in graph}


def forbidden() -> list[str]:
    """A sentence for each import that the table does not allow."""
    found = []
    for name, imported in sorted(module_graph().items()):
        for other in sorted(imported):
            here, there = room(name), room(other)
            if here != there and there != "__init__" and there not in ALLOWED.get(here, set()):
                found.append(f"{name} imports {other}: {here} may not import {there}")
    return found


def entries() -> list[str]:
    """Names directly in the package's folder."""
    return sorted(path.name for path in PACKAGE.iterdir() if path.name != "__pycache__")


def problems() -> list[str]:
    """A sentence for each rule that is broken."""
    found = forbidden()
    for what, graph in (("rooms", room_graph()), ("modules", module_graph())):
        found += [f"{what} import each other: {', '.join(c)}" for c in circles(graph)]
    if len(entries()) > MAX_ENTRIES:
        found.append(f"{NAME}/ holds {len(entries())} entries, at most {MAX_ENTRIES} are allowed")
    return found


def table() -> str:
    """The rooms from the highest floor down, each with what it imports, and the counts."""
    graph = room_graph()
    there = {node: graph[node] - {"__init__"} for node in graph if node != "__init__"}
    lines = []
    if not circles(there):
        height = floors(there)
        for node in sorted(there, key=lambda n: (-height[n], n)):
            imported = ", ".join(sorted(there[node])) or "nothing of the package"
            lines.append(f"{height[node]}  {node:<12} imports {imported}")
        lines.append(f"floors: {max(height.values()) + 1}")
    lines += [
        f"rooms: {len(there)}, arrows between them: {sum(map(len, there.values()))}",
        f"circles: {len(circles(there))} of rooms, {len(circles(module_graph()))} of modules",
        f"entries in {NAME}/: {len(entries())}",
    ]
    return "\n".join(lines)


def occurrences(name: str) -> list[str]:
    """Modules, experiments aside, that use a name: as variable, argument, attribute or key."""

    def uses(node: ast.AST) -> bool:
        attributes = ("id", "arg", "attr", "name", "value")
        return any(getattr(node, attribute, None) == name for attribute in attributes)

    return [
        module
        for module, path in modules().items()
        if room(module) != "experiments"
        and any(map(uses, ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
    ]


def main(names: Sequence[str] = ()) -> int:
    for name in names:
        found = occurrences(name)
        print(f"{name}: {len(found)} modules: {', '.join(found)}")
    if names:
        return 0
    print(table())
    broken = problems()
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
