# SPDX-License-Identifier: Apache-2.0
"""``+capo=NAME`` and ``+rival=NAME`` with the installed verl: they compose, and their knobs arrive
checked.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

from capo_verl.commands.doctor.check import OK, Broken, Outcome, one_line
from capo_verl.config import PRESETS, CapoConfig, verl_knobs
from capo_verl.config.rivals import RIVAL_SPECS, RivalConfig
from capo_verl.launch.dry_run import Compose, composing

ACTOR = "actor_rollout_ref.actor"
BASE = ("model_engine=megatron", f"{ACTOR}.ppo_micro_batch_size_per_gpu=1")
UNKNOWN = f"{ACTOR}.policy_loss.capo.no_such_knob=1"


@contextlib.contextmanager
def _files_read_once() -> Iterator[Compose]:
    """verl's configuration for any number of command lines.

    Hydra reads verl's files for each of them anew, which takes most of the time of this check.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
    from hydra.core.global_hydra import GlobalHydra

    class Kept(CachingConfigRepository):
        def __deepcopy__(self, _: object) -> Kept:  # Hydra copies what it composes from
            return self

    with composing() as compose:
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        loader.repository = cast(ConfigRepository, Kept(loader.repository))
        yield compose


def _arrived(compose: Compose, switch: str) -> tuple[object, str]:
    """verl's dataclass of the policy loss, as its engines get it, and the folder that knobs may
    name.
    """
    from hydra.utils import instantiate

    from capo_verl.plugin.checks.before_start import check_config

    config = compose([*BASE, *switch.split()])
    check_config(config)
    return instantiate(
        config.actor_rollout_ref.actor.policy_loss, _convert_="partial"
    ), config.trainer.default_local_dir


def _check_preset(name: str, compose: Compose) -> None:
    policy_loss, folder = _arrived(compose, f"+capo={name}")
    expected = replace(CapoConfig.from_mapping(verl_knobs(name)), sample_tokens_dir=folder)
    found = getattr(policy_loss, "capo", None)
    if found != expected:
        raise Broken(f"the engines would get {found}, not {expected}")


def _check_rival(name: str, compose: Compose) -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    policy_loss, _ = _arrived(compose, f"+rival={name}")
    found, expected = (
        getattr(policy_loss, "rival", None),
        RivalConfig(name, RIVAL_SPECS[name].knobs()),
    )
    if found != expected:
        raise Broken(f"the engines would get {found}, not {expected}")
    get_policy_loss_fn(name)


def _check_refusal(compose: Compose) -> None:
    try:
        _arrived(compose, f"+capo={next(iter(PRESETS))} +{UNKNOWN}")
    except ValueError:
        return
    raise Broken(f"{UNKNOWN} was accepted")


def switch() -> Outcome:
    """Every preset and every rival, with its defaults; and that an unknown knob is refused."""
    checks: dict[str, Callable[[Compose], None]] = {
        **{f"+capo={name}": functools.partial(_check_preset, name) for name in PRESETS},
        **{f"+rival={name}": functools.partial(_check_rival, name) for name in RIVAL_SPECS},
        "unknown knob": _check_refusal,
    }
    wrong = {}
    with _files_read_once() as compose:
        for name, check in checks.items():
            try:
                check(compose)
            except Broken as e:
                wrong[name] = str(e)
            except Exception as e:  # the others are worth knowing, too
                wrong[name] = one_line(e)
    if wrong:
        name, reason = next(iter(wrong.items()))
        more = f" (and {', '.join(list(wrong)[1:])})" if len(wrong) > 1 else ""
        raise Broken(
            f"{name}: {reason}{more}; install a supported verl and this package again "
            "(scripts/check_stack.py)"
        )
    return Outcome(
        OK,
        f"{len(PRESETS)} presets of +capo and {len(RIVAL_SPECS)} of +rival compose, their knobs "
        "arrive checked",
    )
