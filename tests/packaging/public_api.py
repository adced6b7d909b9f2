# SPDX-License-Identifier: Apache-2.0
"""The public API as text, one fact a line: what a user could notice if it changed.

python -m tests.packaging.public_api      # records it

That is for a change that is meant; a line in CHANGELOG.md goes with it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("public_api.txt")
UPDATE = "python -m tests.packaging.public_api"


def render() -> str:
    """The whole text. Sections are in the order in which ``docs/public_api.md`` names them."""
    parts = (
        _names,
        _configuration,
        _classes,
        _presets,
        _rivals,
        _command_line,
        _metrics,
        _in_verl,
        _in_hydra,
    )
    return "\n".join(
        f"[{part.__name__[1:]}]\n" + "".join(f"{line}\n" for line in part()) for part in parts
    )


def _names() -> Iterator[str]:
    import capo_verl.core
    import capo_verl.core.kl_budget
    import capo_verl.rivals

    for module in (capo_verl, capo_verl.core, capo_verl.rivals):
        for name in sorted(module.__all__):
            getattr(module, name)
            yield f"{module.__name__}.{name}"
    yield f"{capo_verl.core.kl_budget.__name__}.{capo_verl.core.kl_budget.KLBudget.__name__}"


def _configuration() -> Iterator[str]:
    from capo_verl.config import CapoConfig, KLBudgetConfig, TargetRejection
    from capo_verl.plugin.policy_loss import CapoPolicyLossConfig

    for cls in (CapoConfig, TargetRejection, KLBudgetConfig):
        yield from _fields(cls)
        yield from _members(cls)
    inherited = {
        f.name
        for base in CapoPolicyLossConfig.__mro__[1:]
        for f in getattr(base, "__dataclass_fields__", {}).values()
    }
    yield from (
        line
        for line in _fields(CapoPolicyLossConfig)
        if line.split(".")[1].split(":")[0] not in inherited
    )


def _classes() -> Iterator[str]:
    from capo_verl.core import CapoFilter, CapoOutput, ProjectedLogits, curvature_penalty
    from capo_verl.core.batch_shifts import BatchShifts
    from capo_verl.core.kl_budget import KLBudget
    from capo_verl.core.output import Stage
    from capo_verl.rivals import Rival

    for cls in (CapoFilter, KLBudget):
        yield f"{cls.__name__}({_parameters(cls.__init__)})"
        yield from _members(cls)
    for cls in (CapoOutput, ProjectedLogits, Rival):
        yield from _fields(cls)
        yield from _members(cls)
    for named_tuple in (Stage, BatchShifts):
        yield f"{named_tuple.__name__}: {', '.join(named_tuple._fields)}"
    yield _signature("curvature_penalty", curvature_penalty)


def _presets() -> Iterator[str]:
    from capo_verl.config import PRESETS

    for name, preset in PRESETS.items():
        yield f"+capo={name}"
        yield from (f"+capo={name} {knob}={value!r}" for knob, value in preset.knobs.items())
        yield from (f"+capo={name} {path}={value!r}" for path, value in preset.verl.items())


def _rivals() -> Iterator[str]:
    from capo_verl.config.rivals import RIVAL_SPECS

    for name, spec in RIVAL_SPECS.items():
        yield (
            f"+rival={name} arXiv {spec.paper}, needs "
            f"{', '.join(sorted(spec.needs)) or 'nothing else'}"
        )
        yield from (f"+rival={name} {knob}={value!r}" for knob, value in spec.defaults().items())
        yield from (f"+rival={name} {path}={value!r}" for path, value in spec.verl.items())


def _command_line() -> Iterator[str]:
    from capo_verl.commands.main import make_parser

    parser = make_parser()
    yield from (f"{parser.prog} {line}" for line in _options(parser))
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices.values():
        yield command.prog
        yield from (f"{command.prog} {line}" for line in _options(command))


def _metrics() -> Iterator[str]:
    """Of one step of the filter; docs/metrics.md describes them, and those that the engines add."""
    import torch

    from capo_verl import CapoConfig, CapoFilter
    from capo_verl.core.metrics import StepMetrics

    capo = CapoFilter(CapoConfig(optimizer_model="sgd", top_k=2), vocab_size=3, hidden_size=2)
    mask = torch.ones(1, 1)
    out = capo.evaluate(
        torch.ones(1, 1, 2), torch.eye(3)[:1, None], torch.zeros(1, 1).long(), mask, mask, 1e-3
    )
    metrics = StepMetrics()
    metrics.add(out, mask, mask, torch.zeros(1, 1).long(), 1)
    yield from sorted(metrics.compute())


def _in_verl() -> Iterator[str]:
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY

    for module in ("megatron", "fsdp"):  # the plugin registers engines once verl's are imported
        importlib.import_module(f"verl.workers.engine.{module}.transformer_impl")
    for kind, registry in (
        ("policy loss", POLICY_LOSS_REGISTRY),
        ("advantage estimator", ADV_ESTIMATOR_REGISTRY),
    ):
        yield from sorted(
            f"{kind} {name}" for name, found in registry.items() if _ours(found.__module__)
        )
    for model, backends in EngineRegistry._engines.items():
        yield from sorted(
            f"engine {model} {backend} {' '.join(key) if isinstance(key, tuple) else key}"
            for backend, engines in backends.items()
            for key, engine in engines.items()
            if _ours(engine.__module__)
        )
    yield from sorted(
        f"rollout {' '.join(key)}"
        for key, found in _ROLLOUT_REGISTRY.items()
        if str(found).startswith("capo_verl.")
    )


def _in_hydra() -> Iterator[str]:
    from hydra.core.config_store import ConfigStore

    from capo_verl.plugin.hydra_groups import store_groups

    store_groups()
    for group in ("capo", "rival"):
        yield from (
            f"{group}={name.removesuffix('.yaml')}"
            for name in sorted(ConfigStore.instance().list(group))
        )


def _ours(module: str) -> bool:
    return module.startswith("capo_verl.")


def _fields(cls: type[Any]) -> Iterator[str]:
    for f in fields(cls):
        default = "" if f.default is MISSING else f" = {f.default!r}"
        if f.default_factory is not MISSING:
            default = f" = {f.default_factory()!r}"
        yield (
            f"{cls.__name__}.{f.name}: "
            f"{f.type if isinstance(f.type, str) else f.type.__name__}{default}"
        )


def _members(cls: type[Any]) -> Iterator[str]:
    """Public methods, class methods and properties that the class itself defines."""
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, classmethod) else member
        if isinstance(member, property) and not name.startswith("_"):
            yield f"{cls.__name__}.{name} -> {inspect.signature(member.fget).return_annotation}"
        elif inspect.isfunction(function) and (name == "__call__" or not name.startswith("_")):
            yield _signature(f"{cls.__name__}.{name}", function)


def _signature(name: str, function: Any) -> str:
    return f"{name}({_parameters(function)}) -> {inspect.signature(function).return_annotation}"


def _parameters(function: Any) -> str:
    """Without ``self``.

    Written here because ``inspect``'s own text differs between versions of Python.
    """
    parts: list[str] = []
    for p in inspect.signature(function).parameters.values():
        if p.name in ("self", "cls"):
            continue
        if p.kind is p.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        parts.append(f"{stars}{p.name}: {p.annotation}{default}")
    return ", ".join(parts)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        name = " ".join(action.option_strings) or action.dest
        facts = {"nargs": action.nargs, "choices": action.choices, "default": action.default}
        shown = [f"{key}={str(value) if isinstance(value, Path) else value!r}" for key,
            value in facts.items()
                 if value not in (None, argparse.SUPPRESS)]  # fmt: skip
        required = ["required"] if action.required and action.option_strings else []
        yield " ".join([name, *shown, *required])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "file", nargs="?", type=Path, default=RECORDED, help=f"default: {RECORDED.name}"
    )
    file = parser.parse_args().file
    os.environ["VERL_PLATFORM"] = "cpu"  # verl looks for an accelerator as it is imported
    file.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
