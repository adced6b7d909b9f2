# SPDX-License-Identifier: Apache-2.0
"""Entry point of group ``verl.plugins``: verl imports this module in the driver and in every Ray worker.

Nothing heavy happens here. Each registration waits for the verl module that owns the registry, so a process pays only for
what it uses. verl swallows exceptions of plugins at DEBUG level; ours are logged as errors, ``capo-verl doctor`` reports
them, and a run with CAPO switched on refuses to start.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType

import wrapt

from capo_verl import compat
from capo_verl.launch import stop
from capo_verl.launch.outcome import REFUSED

logger = logging.getLogger(__name__)

FAILURES: dict[str, Exception] = {}
"""What could not be registered in this process, and why."""


def on_cpu() -> bool:
    """Whether the embedded CPU default is selected (``VERL_PLATFORM=cpu``)."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def raise_if_broken() -> None:
    """Refuse to go on after a failed registration.

    Raises:
        RuntimeError: naming what failed and why.
    """
    if FAILURES:
        reasons = "; ".join(f"{what}: {type(e).__name__}: {e}" for what, e in FAILURES.items())
        raise RuntimeError(f"capo_verl could not register with verl ({reasons}); `capo-verl doctor` tells more")


def _guarded(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as e:
        FAILURES[what] = e
        logger.exception("capo_verl could not register its %s with verl", what)


def _when_imported(module: str, what: str, action: Callable[[ModuleType], object]) -> None:
    wrapt.register_post_import_hook(lambda imported: _guarded(what, lambda: action(imported)), module)


def _import(name: str) -> Callable[[ModuleType], object]:
    return lambda _: importlib.import_module(name)


def _call(module: str, function: str) -> Callable[[ModuleType], object]:
    """A function of ours, imported when verl's module is, and called with that."""
    return lambda imported: getattr(importlib.import_module(module), function)(imported)


def _keep_metric_names(module: ModuleType) -> None:
    """verl prefixes everything the actor reports with ``actor/``; ours arrive as ``capo/...``."""
    rename_dict = module.rename_dict

    def rename(data: dict, prefix: str = "") -> dict:
        return {**rename_dict({k: v for k, v in data.items() if not k.startswith("capo/")}, prefix),
                **{k: v for k, v in data.items() if k.startswith("capo/")}}  # fmt: skip

    module.rename_dict = rename


def refusal(error: BaseException) -> str:
    """One line for an error that says what to change."""
    return f"capo_verl: refused before start: {' '.join(str(error).split())}"


def _check_before_start(module: ModuleType) -> None:
    """Check where verl validates its config: in the driver, before Ray starts. What is refused there ends it with one line."""
    validate_config = module.validate_config

    @functools.wraps(validate_config)
    def validate(config, *args, **kwargs):  # type: ignore[no-untyped-def]
        from hydra.errors import HydraException

        from capo_verl.launch.checkpoints import check_resume
        from capo_verl.launch.identity import check_identity, record_identity
        from capo_verl.launch.preflight import check_files
        from capo_verl.startup_checks import check_run

        try:
            check_run(config)
            check_files(config)
            check_resume(config)
            check_identity(config)
            validate_config(config, *args, **kwargs)
            record_identity(config)
        except (ValueError, AssertionError, RuntimeError, HydraException) as e:
            # In a Ray worker (verl's legacy trainer) the exception is what reaches the driver.
            ray = sys.modules.get("ray")
            if not str(e) or (ray is not None and ray.is_initialized()):
                raise
            print(refusal(e), file=sys.stderr)
            raise SystemExit(REFUSED) from e

    module.validate_config = validate


def register() -> None:
    """Register everything, lazily. Called once, at import."""
    _when_imported(
        "verl.trainer.ppo.core_algos",
        "policy losses and advantage estimators",
        _import("capo_verl.algorithms.registration"),
    )
    _when_imported("verl.utils.py_functional", "metric names", _keep_metric_names)
    _when_imported("verl.utils.config", "start-up checks", _check_before_start)
    _when_imported("verl.trainer.ppo.v1.trainer_sync", "stop requests", stop.install)
    inputs = "capo_verl.algorithms.rival_inputs"
    _when_imported("verl.workers.utils.losses", "inputs of rival losses", _call(inputs, "hand_on"))
    _when_imported("verl.utils.tensordict_utils", "epochs of rival losses", _call(inputs, "count_epochs"))
    _when_imported(
        "verl.trainer.ppo.v1.trainer_base",
        "advantages of rival losses",
        _call("capo_verl.algorithms.rival_advantages", "follow_advantages"),
    )
    _when_imported("verl.models.transformers.monkey_patch", "shim for trl", compat.shim_trl)
    verl_engine = "verl.workers.engine.{}.transformer_impl"
    _when_imported(verl_engine.format("megatron"), "Megatron engine", _import("capo_verl.megatron.engine"))
    _when_imported(verl_engine.format("fsdp"), "FSDP engine", _import("capo_verl.fsdp.engine"))
    if on_cpu():
        from capo_verl.cpu import process_group

        _guarded("CPU platform", lambda: importlib.import_module("capo_verl.cpu.platform"))
        _when_imported("verl.utils.distributed", "process groups on a CPU", process_group.patch)
        # After ours are complete, also if something imports them before verl's.
        _when_imported("capo_verl.megatron.engine", "Megatron engine on a CPU", _import("capo_verl.cpu.engine"))
        _when_imported("capo_verl.fsdp.engine", "FSDP engine on a CPU", _import("capo_verl.cpu.fsdp_engine"))
        for owner in ("verl.workers.rollout.base", "verl.workers.rollout.replica"):
            _when_imported(owner, "rollout 'hf'", lambda _: importlib.import_module("capo_verl.cpu.rollout").register())


register()
