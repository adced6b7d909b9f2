# SPDX-License-Identifier: Apache-2.0
"""The plugin in this process, which stands for the driver of a run."""

from __future__ import annotations

import functools
from typing import Any

from capo_verl.commands.doctor import registration
from capo_verl.commands.doctor.check import OK, Broken, Outcome


@functools.cache
def seen() -> dict[str, Any]:
    """Looked at once: verl is imported once per process."""
    return registration.look()


def _ok_unless(problem: str | None, message: str) -> Outcome:
    if problem:
        raise Broken(problem)
    return Outcome(OK, message)


def plugin() -> Outcome:
    """The entry point, and that verl loads it."""
    return _ok_unless(registration.plugin_problem(seen()), "verl loads capo_verl.plugin.register")


def hooks() -> Outcome:
    """Losses, estimators, and every other hook."""
    loss = f"policy loss '{registration.LOSS}', advantage estimator '{registration.ESTIMATOR}'"
    return _ok_unless(
        registration.registration_problem(seen()),
        f"{loss}, hooks in {len(registration.MODULES)} modules of verl",
    )


def engine(*backends: str) -> Outcome:
    """The classes that verl would train with."""
    problem = next(
        filter(None, (registration.engine_problem(seen(), backend) for backend in backends)), None
    )
    names = dict.fromkeys(seen()["engines"].get(backend, {}).get("name") for backend in backends)
    return _ok_unless(problem, f"verl uses {' and '.join(map(str, names))}")


@functools.cache
def bridge_problem(vanilla_mbridge: bool) -> str | None:
    """Why the way to the weights that a configuration takes cannot be imported; None if it can."""
    return registration.bridge_problem(registration.bridge_error(vanilla_mbridge), vanilla_mbridge)
