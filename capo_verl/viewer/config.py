# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: where it can be read from, and what two of them differ in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

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

    Raises:
        ValueError: for a file that cannot be read.
    """
    for place in (*HYDRA, *IDENTITY):
        path = folder / place
        if path.is_file():
            try:
                return flatten(_load(path))
            except Exception as e:
                raise ValueError(
                    f"{path}: cannot be read as a configuration ({type(e).__name__}: {e})"
                ) from e
    return None


def _load(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        return dict(json.loads(path.read_text(encoding="utf-8")))
    from omegaconf import OmegaConf

    config = OmegaConf.load(path)
    try:
        found = OmegaConf.to_container(config, resolve=True)
    except Exception:  # an interpolation of Hydra's own, say, which exists only while it runs
        found = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in dict(cast("dict[Any, Any]", found)).items()}


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
