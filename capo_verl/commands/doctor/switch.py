# SPDX-License-Identifier: Apache-2.0
"""Do ``+capo=NAME`` and ``+rival=NAME`` compose with the installed verl, and do their knobs arrive,
checked?
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from capo_verl.commands.doctor.check import OK, Broken, Outcome, one_line
from capo_verl.config import PRESETS, CapoConfig, verl_knobs
from capo_verl.config.rivals import RIVAL_SPECS, RivalConfig
from capo_verl.launch.dry_run import compose

ACTOR = "actor_rollout_ref.actor"
BASE = ("model_engine=megatron", f"{ACTOR}.ppo_micro_batch_size_per_gpu=1")
UNKNOWN = f"{ACTOR}.policy_loss.capo.no_such_knob=1"


def _arrived(switch: str) -> tuple[object, str]:
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


def _check_preset(name: str) -> None:
    policy_loss, folder = _arrived(f"+capo={name}")
    expected = replace(CapoConfig.from_mapping(verl_knobs(name)), sample_tokens_dir=folder)
    found = getattr(policy_loss, "capo", None)
    if found != expected:
        raise Broken(f"the engines would get {found}, not {expected}")


def _check_rival(name: str) -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    policy_loss, _ = _arrived(f"+rival={name}")
    found, expected = (
        getattr(policy_loss, "rival", None),
        RivalConfig(name, RIVAL_SPECS[name].knobs()),
    )
    if found != expected:
        raise Broken(f"the engines would get {found}, not {expected}")
    get_policy_loss_fn(name)


def _check_refusal() -> None:
    try:
        _arrived(f"+capo={next(iter(PRESETS))} +{UNKNOWN}")
    except ValueError:
        return
    raise Broken(f"{UNKNOWN} was accepted")


def switch() -> Outcome:
    """Every preset and every rival, with its defaults; and that an unknown knob is refused."""
    checks: dict[str, Callable[[], None]] = {
        **{f"+capo={name}": functools.partial(_check_preset, name) for name in PRESETS},
        **{f"+rival={name}": functools.partial(_check_rival, name) for name in RIVAL_SPECS},
        "unknown knob": _check_refusal,
    }
    wrong = {}
    for name, check in checks.items():
        try:
            check()
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
