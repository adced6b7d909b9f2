# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: where it can be read from, and what two of them differ in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from capo_verl.viewer.notes import reason
from capo_verl.viewer.plain import LARGEST_FILE, plain, read_yaml

HYDRA = (
    ".hydra/config.yaml",
    "hydra/.hydra/config.yaml",
    "../.hydra/config.yaml",
    "../hydra/.hydra/config.yaml",
)
"""Places of Hydra's copy, from the folder of the log.

The launchers set ``hydra.run.dir`` to ``$OUTPUT_DIR/hydra``.
"""
IDENTITY = ("checkpoints/run.json", "run.json")
"""The few settings that the launchers remember beside checkpoints, where Hydra's copy is gone."""
REFERENCE = re.compile(r"(?<!\\)\$\{([\w./-]+)\}")
ROUNDS, LONGEST_VALUE = 5, 1000
"""Rounds of following references, and characters that references may make of a value."""
UNIMPORTANT = re.compile(
    r"(^|\.)(experiment_name|project_name|run_name|config_hash)$|(_dir|_path|_port|_root)$|^hydra\.|^ray_kwargs\."
)
"""Keys that say where a run lies, not what it does."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys; lists stay as they are."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{name}.")
        else:
            found[name] = value
    return found


def find_config(folder: Path) -> dict[str, Any] | None:
    """The configuration in or beside the folder of a log, with dotted keys; None without one.

    Whoever wrote it may be a stranger, and what is read may be passed on. So no resolver runs:
    ``${oc.env:HOME}`` stays text. References to other values of the file (``${data.seed}``) are
    followed.

    Raises:
        ValueError: for a file that cannot be read.
    """
    for place in (*HYDRA, *IDENTITY):
        path = folder / place
        if path.is_file():
            try:
                return read_config(path)
            except Exception as e:  # of many kinds
                raise ValueError(f"{path}: cannot be read as a configuration ({reason(e)})") from e
    return None


def read_config(path: Path) -> dict[str, Any]:
    """A configuration in JSON or YAML, as :func:`find_config` returns it."""
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{size:,} bytes, more than {LARGEST_FILE:,}")
    text = path.read_text(encoding="utf-8")
    return settings(json.loads(text) if path.suffix == ".json" else read_yaml(text))


def settings(config: Any) -> dict[str, Any]:
    """A configuration with dotted keys and plain values, references among them followed.

    Raises:
        ValueError: if it is no mapping, or beyond the bounds of :mod:`capo_verl.viewer.plain`.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a mapping, got {type(config).__name__}")
    return follow_references(flatten(plain(config)))


def follow_references(config: dict[str, Any]) -> dict[str, Any]:
    """Put single values in the place of ``${their.key}``, without any resolver.

    A reference to something else, to itself, or through too many others stays as it stands.
    """
    for _ in range(ROUNDS):
        before, changed = dict(config), False
        for key, value in before.items():
            if isinstance(value, str) and "${" in value:
                config[key] = _follow(value, before)
                changed = changed or config[key] != value
        if not changed:
            break
    return config


def _follow(text: str, config: Mapping[str, Any]) -> Any:
    def single(match: re.Match[str]) -> Any:
        found = config.get(match[1], match[0])
        return match[0] if isinstance(found, list | Mapping) else found

    if whole := REFERENCE.fullmatch(text):
        return single(whole)
    replaced = REFERENCE.sub(lambda match: str(single(match)), text)
    return replaced if len(replaced) <= LONGEST_VALUE else text


def varying_keys(configs: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """Keys whose values are not the same in all configurations that were found.

    Keys that only say where a run lies are left out.
    """
    known = [config for config in configs if config is not None]
    keys = sorted({key for config in known for key in config})
    return [
        key
        for key in keys
        if not UNIMPORTANT.search(key) and not _same([config.get(key) for config in known])
    ]


def _same(values: list[Any]) -> bool:
    return all(value == values[0] for value in values[1:])


def names_key(key: str, name: str) -> bool:
    """True if ``name`` (``seed``, ``data.seed``) is the dotted key or its last part.

    The last part may have a prefix (``base_seed``).
    """
    last = key.rsplit(".", 1)[-1]
    return key == name or last == name or last.endswith(f"_{name}")
