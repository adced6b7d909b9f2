# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md quotes this project's messages as the source has them.

In its tables under ``| message |`` the first cell is one code span: a part of a string of the
source, with ``…`` for each value that is filled in. Tables under ``| symptom |`` are about other
people's messages and are not compared.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = ("capo_verl", "hydra_plugins", "scripts", "examples")
PERCENT = re.compile(r"%(?:\.\d+)?[sdreg]")
SHELL_VALUE = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)|\$\{[^{}]*\}|\$\w+|\$[*@#?]")
SHELL_CONTINUED = re.compile(r'" \\\n\s*"')
LEAST = 12
"""Characters of a quotation besides ``…``: fewer could be anything."""

COMPLETE = (
    "capo_verl/config/capo.py", "capo_verl/engines/mixin.py", "capo_verl/engines/filter_step.py",
    "capo_verl/engines/fsdp/engine.py",
    "capo_verl/engines/lm_head.py", "capo_verl/config/kl_budget.py",
    "capo_verl/engines/kl_control.py", "capo_verl/engines/kl_probe.py",
    "capo_verl/config/checks.py", "capo_verl/plugin/checks/identity.py",
    "capo_verl/plugin/checks/sizes.py", "capo_verl/plugin/checks/files.py",
    "capo_verl/engines/megatron/engine.py", "capo_verl/engines/megatron/parameters.py",
    "capo_verl/engines/megatron/routing.py",
    "capo_verl/plugin/register.py",
    "capo_verl/plugin/policy_loss.py", "capo_verl/plugin/checks/rivals.py",
    "capo_verl/engines/checkpoint_files.py", "capo_verl/plugin/checks/capo.py",
    "capo_verl/plugin/checks/vllm_on_cpu.py", "capo_verl/cpu/rollout/vllm.py",
)  # fmt: skip
"""Modules of which every message that is raised, logged as a warning, or returned as a problem has
to be on the page.
"""


def template(node: ast.AST) -> str | None:
    """The text of a string, f-string, or sum of them, ``…`` for what is filled in; None for another
    expression.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return PERCENT.sub("…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return None if left is None and right is None else (left or "…") + (right or "…")
    return None


def strings_of(source: str) -> list[str]:
    """Templates of a Python file."""
    return [text for node in ast.walk(ast.parse(source)) if (text := template(node)) is not None]


def shell_strings_of(source: str) -> list[str]:
    """Lines of a shell script, ``…`` for what is expanded; strings in several lines are one."""
    joined = SHELL_CONTINUED.sub(" ", source)
    return [SHELL_VALUE.sub("…", line) for line in joined.splitlines()]


def source_strings(root: Path = ROOT) -> list[str]:
    found = []
    for folder in SOURCES:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix == ".py":
                found += strings_of(path.read_text(encoding="utf-8"))
            elif path.suffix in (".sh", ".sbatch"):
                found += shell_strings_of(path.read_text(encoding="utf-8"))
    return found


def quotations(page: str) -> list[str]:
    """First cells of the tables under ``| message |``."""
    found, inside = [], False
    for line in page.splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.startswith("| message |"):
            inside = True
        elif inside and not line.startswith("|---"):
            cell = line[1:].split("` |")[0].strip()
            assert cell.startswith("`"), f"no message in code format at the beginning of: {line}"
            found.append(cell[1:])
    return found


def unknown(page: str, strings: list[str]) -> list[str]:
    """Quotations which no string of the source has."""
    return [
        q
        for q in quotations(page)
        if len(q.replace("…", "")) < LEAST or not any(q in s for s in strings)
    ]


def messages_of(source: str) -> Iterator[str]:
    """What a module raises, warns of, or yields or returns as a sentence."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if ast.unparse(node.exc.func) == "AttributeError":
                continue  # of a module, for Python's own protocol
            told = template(node.exc.args[0])
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "warning"
        ):
            told = template(node.args[0])
        elif isinstance(node, ast.Yield) and node.value is not None:
            told = template(node.value)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            told = template(node.value.elts[0])
        else:
            continue
        if told is not None and len(told.replace("…", "")) >= LEAST:
            yield told


STRINGS, TEXT = source_strings(), PAGE.read_text(encoding="utf-8")


def test_every_quotation_is_in_the_source() -> None:
    assert len(quotations(TEXT)) > 100
    assert unknown(TEXT, STRINGS) == []


@pytest.mark.parametrize("module", COMPLETE)
def test_every_message_of_these_modules_is_on_the_page(module: str) -> None:
    quoted = quotations(TEXT)
    told = messages_of((ROOT / module).read_text(encoding="utf-8"))
    assert [message for message in told if not any(q in message for q in quoted)] == []


def test_every_row_says_why_and_what_to_do() -> None:
    rows = [
        re.split(r" \| ", line.strip("| "))
        for line in TEXT.splitlines()
        if re.match(r"\| (?!message|symptom)", line)
    ]
    assert [
        row[0] for row in rows if len(row) != 3 or not all(cell.strip(" |") for cell in row)
    ] == []


def test_a_changed_message_is_found() -> None:
    page = (
        "| message | why |\n|---|---|\n| `capo.…: expected a number` | |\n\n| symptom | why "
        "|\n|---|---|\n| `other words` | |\n"
    )
    source = 'raise ValueError(f"capo.{key}: "\n    "expected a number, got none")'
    assert unknown(page, strings_of(source)) == []
    assert unknown(page, strings_of(source.replace("a number", "numbers"))) == [
        "capo.…: expected a number"
    ]
    assert unknown(page, strings_of(source.replace("{key}", "mode"))) == [
        "capo.…: expected a number"
    ]
    assert unknown(page.replace("capo.…: expected", "…: ex…"), strings_of(source)) == [
        "…: ex… a number"
    ]


def test_messages_are_found_in_logs_and_shell_scripts() -> None:
    source = (
        'logger.warning("held %r after %d steps " + name, a, b)\nraise E\nreturn f"not {x}", None'
    )
    assert list(messages_of(source.replace("return", "def f():\n    return"))) == [
        "held … after … steps …"
    ]
    assert shell_strings_of('refuse "CAPO=$CAPO, ${x:-1}" \\\n    "of $(f $(g)): no"') == [
        'refuse "CAPO=…, … of …: no"'
    ]


def test_threads_are_linked_to_where_they_are() -> None:
    """The text of a link names the repository and number of its address, and each address is that
    of a thread.
    """
    links = re.findall(r"\[([\w./-]+)#(\d+)\]\((https://github\.com/[^)]+)\)", TEXT)
    assert len(links) > 15
    for name, number, url in links:
        owner, repository, kind, at = url.removeprefix("https://github.com/").split("/")
        assert (name, number) == (f"{owner}/{repository}", at) and kind in ("issues", "pull"), url
