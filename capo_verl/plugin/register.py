# SPDX-License-Identifier: Apache-2.0
"""Entry point of group ``verl.plugins``, imported in the driver and in every Ray worker.

Nothing heavy happens here. Each registration waits for the verl module that owns the registry, so a
process pays only for what it uses. verl swallows exceptions of plugins at DEBUG level; ours are
logged as errors, ``capo-verl doctor`` reports them, and a run with CAPO switched on refuses to
start.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from capo_verl import config
from capo_verl.plugin import compat, stop
from capo_verl.plugin.state import FAILURES, REFUSED, on_cpu, refusal

logger = logging.getLogger(__name__)


def _guarded(what: str, action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as e:
        FAILURES[what] = e
        logger.exception("capo_verl could not register its %s with verl", what)


def _when_imported(module: str, what: str, action: Callable[[ModuleType], object]) -> None:
    wrapt.register_post_import_hook(
        lambda imported: _guarded(what, lambda: action(imported)), module
    )


def _import(*names: str) -> Callable[[ModuleType], object]:
    return lambda _: [importlib.import_module(name) for name in names]


def _call(module: str, function: str) -> Callable[[ModuleType], object]:
    """A function of ours, imported when verl's module is, and called with that."""
    return lambda imported: getattr(importlib.import_module(module), function)(imported)


def _keep_metric_names(module: ModuleType) -> None:
    """verl prefixes everything the actor reports with ``actor/``; ours arrive as ``capo/...``."""
    rename_dict = module.rename_dict

    def rename(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        ours = {key: value for key, value in data.items() if key.startswith("capo/")}
        verls = {key: value for key, value in data.items() if key not in ours}
        return {**rename_dict(verls, prefix), **ours}

    module.rename_dict = rename  # type: ignore[attr-defined]


def _check_before_start(module: ModuleType) -> None:
    """Check where verl validates its config: in the driver, before Ray starts.

    What is refused there ends it with one line.
    """
    validate_config = module.validate_config

    @functools.wraps(validate_config)
    def validate(config: Any, *args: Any, **kwargs: Any) -> None:
        from hydra.errors import HydraException

        from capo_verl.plugin.checks.before_start import before_start
        from capo_verl.plugin.checks.identity import record_identity

        try:
            before_start(config)
            validate_config(config, *args, **kwargs)
            record_identity(config)
        except (ValueError, AssertionError, RuntimeError, HydraException) as e:
            # In a Ray worker (verl's legacy trainer) the exception is what reaches the driver.
            ray = sys.modules.get("ray")
            if not str(e) or (ray is not None and ray.is_initialized()):
                raise
            print(refusal(e), file=sys.stderr)
            raise SystemExit(REFUSED) from e

    module.validate_config = validate  # type: ignore[attr-defined]


def _old_name(name: str) -> object:
    """The class that is named ``capo_verl.config.CapoPolicyLossConfig`` in old configurations."""
    if name != "CapoPolicyLossConfig":
        raise AttributeError(f"module 'capo_verl.config' has no attribute {name!r}")
    return importlib.import_module("capo_verl.plugin.policy_loss").CapoPolicyLossConfig


def register() -> None:
    """Register everything, lazily. Called once, at import."""
    config.__getattr__ = _old_name  # type: ignore[method-assign]  # of release 0.1
    inputs, trainer = "capo_verl.plugin.rival_inputs", "verl.trainer.ppo.v1"
    for module, what, action in (
        (
            "verl.trainer.ppo.core_algos",
            "policy losses and advantage estimators",
            _import("capo_verl.plugin.losses", "capo_verl.plugin.rivals"),
        ),
        ("verl.utils.py_functional", "metric names", _keep_metric_names),
        ("verl.utils.config", "start-up checks", _check_before_start),
        *((f"{trainer}.trainer_{mode}", "stop requests", stop.install) for mode in stop.TRAINERS),
        ("verl.workers.utils.losses", "inputs of rival losses", _call(inputs, "hand_on")),
        ("verl.utils.tensordict_utils", "epochs of rival losses", _call(inputs, "count_epochs")),
        (
            f"{trainer}.trainer_base",
            "advantages of rival losses",
            _call(inputs, "follow_advantages"),
        ),
        ("verl.models.transformers.monkey_patch", "shim for trl", compat.shim_trl),
        (
            "megatron.bridge.models.conversion.model_bridge",
            "shim for Megatron-Bridge",
            compat.trim_vocabulary,
        ),
        (
            "verl.workers.engine.megatron.transformer_impl",
            "Megatron engine",
            _import("capo_verl.engines.megatron.engine"),
        ),
        (
            "verl.workers.engine.fsdp.transformer_impl",
            "FSDP engine",
            _import("capo_verl.engines.fsdp.engine"),
        ),
    ):
        _when_imported(module, what, action)
    if on_cpu():
        _register_cpu()


def _register_cpu() -> None:
    _guarded("CPU platform", lambda: importlib.import_module("capo_verl.cpu.platform"))
    _when_imported(
        "verl.utils.distributed",
        "process groups on a CPU",
        _call("capo_verl.cpu.process_group", "patch"),
    )
    # After ours are complete, also if something imports them before verl's.
    for name, engine in (("megatron", "Megatron"), ("fsdp", "FSDP")):
        cpu_engine = _import(f"capo_verl.cpu.{name}.engine")
        _when_imported(f"capo_verl.engines.{name}.engine", f"{engine} engine on a CPU", cpu_engine)

    def backend(_: ModuleType) -> None:
        importlib.import_module("capo_verl.cpu.rollout.backend").register()

    _when_imported(
        "verl.trainer.ppo.v1.replay_buffer",
        "replay buffer on a CPU",
        _call("capo_verl.cpu.replay_buffer", "patch"),
    )
    _when_imported(
        "verl.checkpoint_engine.base",
        "checkpoint engine 'gloo'",
        _import("capo_verl.cpu.rollout.gloo"),
    )
    _when_imported(
        "verl.experimental.separation.engine_workers",
        "copies of the model on a CPU",
        _call("capo_verl.cpu.saved_models", "patch"),
    )
    for owner in ("verl.workers.rollout.base", "verl.workers.rollout.replica"):
        _when_imported(owner, "rollout 'hf'", backend)
    vllm = "capo_verl.cpu.rollout.vllm"
    _guarded("vLLM's name", lambda: importlib.import_module(vllm).name_distribution())
    _when_imported(
        "vllm.model_executor.layers.utils", "weights of vLLM on a CPU", _call(vllm, "keep_weights")
    )


register()
