# SPDX-License-Identifier: Apache-2.0
"""A folder built once per recipe: complete or absent, never half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
ABANDONED_SECONDS = 6 * 3600.0
"""Age at which an unfinished folder is taken for that of a builder that was killed."""


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
    _remove_abandoned(root, target)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=root))
    try:
        build(scratch)
        manifest = {"recipe": recipe, "files": _digests(scratch)}
        (scratch / MANIFEST).write_text(
            json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        scratch.chmod(0o755)
        while not _moved(scratch, target):
            if is_complete(target, recipe):  # another process was faster
                return target, True
            shutil.rmtree(target, ignore_errors=True)  # damaged; another may remove it, too
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target, False


def _moved(folder: Path, target: Path) -> bool:
    """Rename a folder; False if there is one that is not empty at ``target``."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _remove_abandoned(root: Path, target: Path) -> None:
    """Remove what builders of ``target`` have left that were killed: a living one writes to it."""
    for scratch in root.glob(f".{target.name}.*"):
        try:
            newest = max(path.stat().st_mtime for path in (scratch, *scratch.rglob("*")))
        except OSError:  # it is being moved or removed
            continue
        if time.time() - newest > ABANDONED_SECONDS:
            shutil.rmtree(scratch, ignore_errors=True)


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
