# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/config.md from the dataclasses that define the knobs:
``python docs/config_reference.py``.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from generated import renewed

from capo_verl.config import FROM_OPTIMIZER, PRESETS, CapoConfig, KLBudgetConfig, TargetRejection
from capo_verl.config.rivals import RIVAL_SPECS

PAGE = Path(__file__).with_name("config.md")
BLOCK = "actor_rollout_ref.actor.policy_loss"


def descriptions(cls: type) -> dict[str, str]:
    """The docstring below each field, as Markdown on one line; those of base classes included.

    Raises:
        ValueError: for a field without one.
    """
    found: dict[str, str] = {}
    for owner in reversed([c for c in cls.__mro__ if is_dataclass(c)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in zip(definition.body, definition.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                found[statement.target.id] = markdown(str(following.value.value))
    for field in fields(cls):
        if field.name not in found:
            raise ValueError(f"{cls.__name__}.{field.name} has no docstring below it")
    return found


def markdown(docstring: str) -> str:
    text = re.sub(r"\s+", " ", docstring.replace("``", "`")).strip().replace("|", "\\|")
    return re.sub(r"\bNone\b", "null", text)


def value(x: Any) -> str:
    """As one writes it in YAML or on Hydra's command line."""
    if isinstance(x, float):
        return f"{x:g}".replace("e-0", "e-")
    return str(x) if isinstance(x, str) else json.dumps(x)


def allowed(field: Any) -> str:
    """What a rival's knob declares of itself."""
    rule = field.metadata
    if "choices" in rule:
        return ", ".join(f"`{choice}`" for choice in rule["choices"])
    if "range" not in rule:
        return "`true`, `false`"
    low, high, low_open = rule["range"]
    text = f"{'(' if low_open else '['}{low:g}, {'∞)' if high == float('inf') else f'{high:g}]'}"
    return text + (" or `null`" if rule["null"] else "")


def knobs(cls: type, prefix: str, exclude: tuple[str, ...] = ()) -> Iterator[str]:
    """A table of one dataclass."""
    told = descriptions(cls)
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for field in fields(cls):
        if field.name in exclude:
            continue
        default = "required" if field.default is MISSING else f"`{value(field.default)}`"
        yield f"| `{prefix}.{field.name}` | {default} | {told[field.name]} |"


def rival(name: str) -> Iterator[str]:
    spec = RIVAL_SPECS[name]
    told = descriptions(spec.knobs)
    yield f"| `{name}` | `name` | | | {spec.description} (arXiv {spec.paper}){sets(spec.verl)} |"
    for field in fields(spec.knobs):
        yield (
            f"| | `{field.name}` | `{value(field.default)}` | {allowed(field)} | "
            f"{told[field.name]} |"
        )


def sets(verl: dict[str, Any]) -> str:
    return "; sets " + ", ".join(f"`{key}={value(v)}`" for key, v in verl.items()) if verl else ""


def render() -> str:
    """All tables, with their headings."""
    lines = [
        "## `capo`",
        "",
        f"Under `{BLOCK}.capo`.",
        "",
        *knobs(CapoConfig, "capo", FROM_OPTIMIZER),
        "",
    ]
    lines += [
        "### `capo.policy_shift_max` as a mapping",
        "",
        *knobs(TargetRejection, "policy_shift_max"),
        "",
    ]
    lines += ["### `capo.kl_budget`", "", *knobs(KLBudgetConfig, "kl_budget"), ""]
    lines += [
        "## Presets: `+capo=NAME`",
        "",
        "| `+capo=` | | knobs that differ from the defaults | verl's settings |",
    ]
    lines += ["|---|---|---|---|"]
    for name, preset in PRESETS.items():
        own = {
            key: v
            for key, v in preset.knobs.items()
            if v != CapoConfig.__dataclass_fields__[key].default
        }
        told = "<br>".join(
            "`kl_budget`" if key == "kl_budget" else f"`{key}={value(v)}`" for key, v in own.items()
        )
        verl = "<br>".join(f"`{key}={value(v)}`" for key, v in preset.verl.items())
        lines.append(f"| `{name}` | {preset.description} | {told or 'none'} | {verl or 'none'} |")
    lines += ["", "## Rivals: `+rival=NAME`", "", f"Under `{BLOCK}.rival`.", ""]
    lines += ["| `+rival=` | key | default | allowed | meaning |", "|---|---|---|---|---|"]
    lines += [line for name in RIVAL_SPECS for line in rival(name)]
    return "\n".join(lines)


def written() -> str:
    """The page with its tables renewed."""
    return renewed(PAGE, render())


if __name__ == "__main__":
    PAGE.write_text(written(), encoding="utf-8")
