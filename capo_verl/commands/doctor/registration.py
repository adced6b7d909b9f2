# SPDX-License-Identifier: Apache-2.0
"""Traces of this project in verl, in the process that asks: the driver, or a Ray worker.

:func:`look` is sent to workers by value, because there this project may be missing. So it imports
nothing at module level but the standard library, and refers to nothing outside this file.
:func:`problems` judges what it found.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import os
import platform
import sys
from typing import Any

MODULES = (
    "verl",
    "verl.trainer.ppo.core_algos",
    "verl.utils.py_functional",
    "verl.utils.config",
    "verl.utils.distributed",
    "verl.utils.tensordict_utils",
    "verl.workers.utils.losses",
    "verl.workers.engine",
    "verl.workers.rollout.base",
    "verl.workers.rollout.replica",
    "verl.trainer.ppo.v1.trainer_base",
    "verl.trainer.ppo.v1.trainer_sync",
)
"""The modules of verl whose import lets the plugin register something
(``capo_verl/plugin/register.py``).
"""
ENGINES = {"megatron": "Megatron-Core", "fsdp": "torch", "fsdp2": "torch"}
"""verl's name of a backend -> what it needs."""
LOSS, ESTIMATOR = "capo", "reinforce"
GROUP, POLICY = "verl.plugins", "VERL_USE_EXTERNAL_PLUGINS"
PACKAGES = ("capo-verl", "verl", "torch", "megatron-core")


def look() -> dict[str, Any]:
    """Import verl as a run would, and report. Raises nothing; the result is plain data (JSON).

    Returns:
        ``entry_points``: names under which this project is a plugin of verl; ``policy``:
            ``VERL_USE_EXTERNAL_PLUGINS``;
        ``loaded``: whether verl has loaded it; ``errors``: module -> why it could not be imported;
            ``failures``: what the plugin
        could not register -> why; ``missing``: registered names that are not there; ``engines``:
        backend -> ``name``, whether it is ``ours``, and of Megatron's the ``bridge_error``
            (:func:`bridge_error`), or ``error``; ``versions``: package -> version, None if it is
        not installed.
    """

    def text(error: BaseException) -> str:
        return " ".join(f"{type(error).__name__}: {error}".split())

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    errors: dict[str, str] = {}
    collecting = gc.isenabled()
    gc.disable()  # imports leave next to nothing to collect, and looking takes a fifth of the time
    for name in MODULES:
        if "verl" in errors:
            break
        try:
            importlib.import_module(name)
        except Exception as e:
            errors[name] = text(e)
    if collecting:
        gc.enable()
    plugin = sys.modules.get("capo_verl.plugin.register")
    missing = []
    if "verl.trainer.ppo.core_algos" in sys.modules:
        core_algos = sys.modules["verl.trainer.ppo.core_algos"]
        if LOSS not in core_algos.POLICY_LOSS_REGISTRY:
            missing.append(f"policy loss '{LOSS}'")
        if ESTIMATOR not in core_algos.ADV_ESTIMATOR_REGISTRY:
            missing.append(f"advantage estimator '{ESTIMATOR}'")
    engines: dict[str, dict[str, Any]] = {}
    for backend in ENGINES if "verl.workers.engine" in sys.modules else ():
        registry = sys.modules["verl.workers.engine"].EngineRegistry
        try:
            engine = registry.get_engine_cls("language_model", backend)
        except Exception as e:
            engines[backend] = {"error": text(e)}
        else:
            ours = any(base.__module__ == "capo_verl.engines.mixin" for base in engine.__mro__)
            engines[backend] = {"name": f"{engine.__module__}.{engine.__name__}", "ours": ours}
            if backend == "megatron":
                engines[backend]["bridge_error"] = bridge_error()
    entry_points = [
        e for e in importlib.metadata.entry_points(group=GROUP) if e.value.startswith("capo_verl.")
    ]
    policy = os.environ.get(POLICY, "auto")
    if (
        plugin is None
        and entry_points
        and "verl" not in errors
        and policy.strip().lower() != "none"
    ):
        try:  # again: verl does not say why it failed
            importlib.import_module("capo_verl.plugin.register")
        except Exception as e:
            errors["capo_verl.plugin.register"] = text(e)
    return {
        "entry_points": [e.name for e in entry_points],
        "policy": policy,
        "loaded": plugin is not None,
        "errors": errors,
        "failures": {what: text(e) for what, e in plugin.FAILURES.items()} if plugin else {},
        "missing": missing,
        "engines": engines,
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }


def bridge_error(vanilla_mbridge: bool | None = None) -> str:
    """Import the way to Hugging Face weights that verl's Megatron engine takes, as it would.

    Args:
        vanilla_mbridge: of ``actor.megatron``; None for verl's default, Megatron-Bridge.

    Returns:
        Why it cannot be imported; empty if it can.
    """
    try:
        engine = importlib.import_module("verl.workers.engine").EngineRegistry.get_engine_cls(
            "language_model", "megatron"
        )
        config = importlib.import_module("verl.workers.config").McoreEngineConfig()
        if vanilla_mbridge is not None:
            config.__dict__["vanilla_mbridge"] = vanilla_mbridge  # the dataclass is frozen
        own = sys.modules[engine.__module__]
        if hasattr(own, "prepare_bridge"):  # on a CPU: what is installed, and without CUDA
            own.prepare_bridge(own.cpu_engine_config(config))
        else:
            name = "mbridge" if config.vanilla_mbridge else "bridge"
            importlib.import_module(f"verl.models.mcore.{name}")
    except Exception as e:
        return " ".join(f"{type(e).__name__}: {e}".split())
    return ""


def bridge_problem(error: str, vanilla_mbridge: bool = False) -> str | None:
    """The meaning of the error of :func:`bridge_error`; None if there is none."""
    if not error:
        return None
    name = "mbridge" if vanilla_mbridge else "Megatron-Bridge"
    return (
        f"{name}, which reads and writes the weights, cannot be imported ({error}): "
        "scripts/check_stack.py --stack gpu says what to install; VERL_PLATFORM=cpu runs without "
        "GPUs"
    )


def plugin_problem(seen: dict[str, Any]) -> str | None:
    """Why verl does not load the plugin; None if it does."""
    errors, policy = seen["errors"], seen["policy"]
    if "verl" in errors:
        return (
            f"verl cannot be imported ({errors['verl']}): scripts/check_stack.py says what to "
            "install"
        )
    if not seen["entry_points"]:
        return (
            f"no entry point of group {GROUP} names capo_verl.plugin.register: install the package "
            "there (pip install .)"
        )
    if not seen["loaded"]:
        name = seen["entry_points"][0]
        if "capo_verl.plugin.register" in errors:
            return (
                "capo_verl.plugin.register cannot be imported "
                f"({errors['capo_verl.plugin.register']}): repair that, then try again"
            )
        return f"{POLICY}={policy} keeps verl from loading {name}: unset it, or add {name} to it"
    return None


def registration_problem(seen: dict[str, Any]) -> str | None:
    """Names that are not registered, and why; None if everything is."""
    not_loaded = plugin_problem(seen)
    if not_loaded:
        return f"nothing is registered: {not_loaded}"
    for module, error in seen["errors"].items():
        return f"{module} cannot be imported ({error}): scripts/check_stack.py says what to install"
    if seen["failures"]:
        reasons = "; ".join(f"{what}: {error}" for what, error in seen["failures"].items())
        return (
            f"capo_verl could not register with verl ({reasons}): install a supported stack "
            "(scripts/check_stack.py)"
        )
    if seen["missing"]:
        return (
            f"verl lacks {' and '.join(seen['missing'])}: install capo_verl again (pip install .)"
        )
    return None


def engine_problem(seen: dict[str, Any], backend: str) -> str | None:
    """Why verl would not train with this project's engine; None if it would."""
    found = seen["engines"].get(backend)
    if found is None:
        return f"verl has no engines here: {registration_problem(seen)}"
    if "error" in found:
        return (
            f"verl has no {backend} engine here ({found['error']}): install {ENGINES[backend]} "
            "(scripts/check_stack.py)"
        )
    if not found["ours"]:
        why = plugin_problem(seen) or (
            f"something registered it over this project's: name only capo_verl in {POLICY} and "
            "unset VERL_USE_EXTERNAL_MODULES"
        )
        return f"verl would use {found['name']}, not CAPO's engine: {why}"
    return bridge_problem(found.get("bridge_error", ""))


def problems(seen: dict[str, Any]) -> list[str]:
    """All of the above, each said once."""
    not_loaded = plugin_problem(seen)
    if not_loaded:
        return [not_loaded]
    found = [
        registration_problem(seen),
        *(engine_problem(seen, backend) for backend in seen["engines"]),
    ]
    return [problem for problem in found if problem]
