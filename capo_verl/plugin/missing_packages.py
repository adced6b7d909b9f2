# SPDX-License-Identifier: Apache-2.0
"""One sentence for a missing package: the program that needs it, and its installation."""

from __future__ import annotations

import importlib
import sys

EXTRAS = ("cpu", "smollm2", "data", "viewer", "trl", "study")
"""Extras in which a package is looked for, if the program's own does not install it."""
DISTRIBUTIONS = {"megatron": "megatron-core", "yaml": "pyyaml"}
"""Import name -> distribution, where the two differ by more than ``_`` and ``-``."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def run(program: str, module: str, extra: str) -> int:
    """Run a script: import ``module`` and call its ``main()``.

    Args:
        program: name for messages.
        extra: which extra installs what the program needs.

    Returns:
        The exit code; 2 if a package is missing, after one line on stderr.

    Raises:
        ImportError: if what is missing is part of this project.
    """
    try:
        return int(importlib.import_module(module).main())
    except ImportError as error:
        print(missing(program, error, extra), file=sys.stderr)
        return 2


def missing(program: str, error: ImportError, extra: str) -> str:
    """The sentence, for an error that has reached the top of a program.

    Raises:
        ImportError: ``error`` itself, if what is missing is part of this project: no installation
            would help.
    """
    package = (error.name or "").partition(".")[0]
    if package in ("capo_verl", "hydra_plugins"):
        raise error
    if not package:  # how libraries report what they need in turn
        return f"{program}: {' '.join(str(error).split()).rstrip('.')}: {install(extra)}"
    home = home_of(package, extra)
    remedy = install(home) if home is not None else f"pip install {distribution(package)}"
    if isinstance(error, ModuleNotFoundError):
        return f"{program} needs {package}, which is not installed: {remedy}"
    return (
        f"{program} cannot use the installed {package} ({' '.join(str(error).split())}): {remedy}"
    )


def home_of(package: str, first: str) -> str | None:
    """The extra that installs a package, by its import name.

    ``first`` if that does; "" for a dependency of the project itself.

    None if nothing of this project installs it.
    """
    from packaging.utils import canonicalize_name

    from capo_verl.plugin.stack import declared

    try:
        names = {
            extra: {canonicalize_name(r.name) for r in declared(extra)[1]}
            for extra in ("", *EXTRAS)
        }
    except RuntimeError:  # not installed, and Python 3.10 cannot read pyproject.toml
        return first
    wanted = canonicalize_name(distribution(package))
    return next((extra for extra in ("", first, *EXTRAS) if wanted in names[extra]), None)


def distribution(package: str) -> str:
    """The distribution that provides a module."""
    return DISTRIBUTIONS.get(package, package.replace("_", "-"))


def install(extra: str) -> str:
    """The command that installs an extra; torch's CUDA build must not come with the CPU stack."""
    index = f" --extra-index-url {CPU_INDEX}" if extra == "cpu" else ""
    return f"pip install 'capo-verl[{extra}]'{index}" if extra else "pip install capo-verl"
