# SPDX-License-Identifier: Apache-2.0
"""``capo-verl doctor``: is the plugin loaded, does it win, does the switch compose? Exits with 1 if anything is broken."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from functools import partial

from capo_verl import stack


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("doctor", help="check the installation; exit code 1 names what is broken")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one line per check; 0 if all passed."""
    print(f"Platform: {os.environ.get('VERL_PLATFORM') or 'detected by verl (VERL_PLATFORM=cpu for the CPU)'}")
    failed = 0
    for what, check in CHECKS.items():
        try:
            outcome = check()
        except Unsupported as e:
            print(f"warn  {what}: {e}")
        except Exception as e:  # a check must not hide the others; the reason is printed and the exit code tells
            failed += 1
            print(f"FAIL  {what}: {type(e).__name__}: {e}")
        else:
            print(f"ok    {what}: {outcome}")
    print(f"\n{failed} of {len(CHECKS)} checks failed" if failed else f"\nall {len(CHECKS)} checks passed")
    return 1 if failed else 0


class Unsupported(Exception):
    """Nothing is broken, but nobody has tested this."""


def _software_stack() -> str:
    reports = stack.check_all()
    print(stack.render(reports) + "\n")
    complete = [report.stack for report in reports if report.complete]
    if not complete:
        nearest = min(reports, key=lambda report: len(report.problems))
        wrong = ", ".join(f"{f.name}{f.wanted} ({f.found or 'missing'})" for f in nearest.problems)
        raise Unsupported(f"other versions than the tested ones; the nearest stack, {nearest.stack}, has {wrong}")
    return " and ".join(complete)


def _entry_point() -> str:
    found = [e for e in importlib.metadata.entry_points(group="verl.plugins") if e.value.startswith("capo_verl")]
    if not found:
        raise RuntimeError("no entry point of group verl.plugins; install the package (pip install capo-verl)")
    allowed = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if allowed != "auto" and found[0].name not in allowed.split(","):
        raise RuntimeError(f"VERL_USE_EXTERNAL_PLUGINS={allowed} keeps verl from loading it; add {found[0].name}")
    return found[0].value


def _registered() -> str:
    importlib.import_module("verl")
    from capo_verl import plugin

    for module in ("verl.trainer.ppo.core_algos", "verl.utils.config", "verl.utils.py_functional", "verl.workers.engine",
                   "verl.workers.rollout.replica"):  # fmt: skip
        importlib.import_module(module)
    plugin.raise_if_broken()
    core_algos = importlib.import_module("verl.trainer.ppo.core_algos")
    core_algos.get_policy_loss_fn("capo")
    core_algos.get_adv_estimator_fn("reinforce")
    return "policy loss 'capo', advantage estimator 'reinforce'"


def _engine(backend: str) -> str:
    from verl.workers.engine.base import EngineRegistry

    from capo_verl.engine_mixin import CapoEngineMixin

    engine = EngineRegistry.get_engine_cls("language_model", backend)
    if not issubclass(engine, CapoEngineMixin):
        raise RuntimeError(f"verl would use {engine.__module__}.{engine.__name__}, not CAPO's engine")
    return f"{engine.__module__}.{engine.__name__}"


def _switch() -> str:
    from hydra import compose, initialize_config_module

    from capo_verl.config import PRESETS
    from capo_verl.policy_loss_config import parse_knobs

    with initialize_config_module("verl.trainer.config", version_base=None):
        for name in PRESETS:
            config = compose("ppo_trainer", overrides=["model_engine=megatron", f"+capo={name}"])
            parse_knobs(config.actor_rollout_ref.actor.policy_loss.capo)
    return ", ".join(f"+capo={name}" for name in PRESETS)


CHECKS: dict[str, Callable[[], str]] = {
    "software stack": _software_stack,
    "plugin installed": _entry_point,
    "registered with verl": _registered,
    "Megatron engine": partial(_engine, "megatron"),
    "FSDP engine": partial(_engine, "fsdp2"),
    "switch composes": _switch,
}
