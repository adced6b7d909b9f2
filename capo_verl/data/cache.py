# SPDX-License-Identifier: Apache-2.0
"""A folder built once per recipe: complete or absent, never half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def cache_root() -> Path:
    """``$CAPO_CACHE``, or ``~/.cache/capo_verl``."""
    return Path(os.environ.get("CAPO_CACHE") or Path.home() / ".cache" / "capo_verl")


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """First 16 hex digits of the SHA-256 of the recipe's canonical JSON."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def cached_folder(
    kind: str, recipe: Mapping[str, Any], build: Callable[[Path], None], root: Path | None = None
) -> tuple[Path, bool]:
    """Folder ``<root>/<kind>-<hash of recipe>``, built by ``build`` unless a complete one is there.

    Args:
        kind: first part of the folder's name.
        recipe: everything the contents depend on (JSON values).
        build: fills the empty folder it is given.
        root: parent folder; :func:`cache_root` by default.

    Returns:
        The folder, and whether it was there already.

    Contents are written beside the target and moved into place by one rename, and each file's
    digest is checked on every use, so an interrupted build or a damaged file leads to a rebuild.
    """
    root = Path(root) if root is not None else cache_root()
    target = root / f"{kind}-{recipe_hash(recipe)}"
    if is_complete(target, recipe):
        return target, True
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=root))
    try:
        build(scratch)
        manifest = {"recipe": recipe, "files": _digests(scratch)}
        (scratch / MANIFEST).write_text(
            json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        scratch.chmod(0o755)
        if target.exists():
            if is_complete(target, recipe):  # another process was faster
                return target, True
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target, False


def is_complete(folder: Path, recipe: Mapping[str, Any]) -> bool:
    """True if ``folder`` holds exactly what was built from ``recipe``."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest["recipe"] == json.loads(json.dumps(recipe)) and manifest[
            "files"
        ] == _digests(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
