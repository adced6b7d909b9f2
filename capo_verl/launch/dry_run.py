# SPDX-License-Identifier: Apache-2.0
"""``python -m capo_verl.launch.dry_run key=value ...``: the run of verl's ``main_ppo``, without
starting anything.

Prints the resolved configuration (YAML) and, as comments under it, the plan. The launchers call it
for ``DRY_RUN=1``. ``DRY_RUN=strict`` also refuses what only this machine cannot run: data files
that are not here, a folder that cannot be written to or holds another run's checkpoints. The plan
is for an H100-80GB, with ``DRY_RUN=strict`` for this machine's smallest GPU, or for what
``GPU_MEMORY_GIB`` says. ``CAPO_PLAN=note`` prints what does not fit instead of refusing it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from omegaconf import DictConfig, OmegaConf

from capo_verl.launch.hardware import gpu_memory, machine_memory
from capo_verl.launch.plan import make_plan
from capo_verl.plugin.checks import data, files, identity, run_spec
from capo_verl.plugin.checks.model_shape import find_shape
from capo_verl.plugin.checks.sizes import PLANNED
from capo_verl.plugin.state import REFUSED, on_cpu, refusal

Compose = Callable[[Sequence[str]], DictConfig]


@contextlib.contextmanager
def composing() -> Iterator[Compose]:
    """verl's configuration for a command line, as its ``main_ppo`` composes it.

    Raises:
        hydra.errors.HydraException: if an override does not fit verl's configuration.
    """
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        yield lambda overrides: compose("ppo_trainer", overrides=list(overrides))


def compose(overrides: Sequence[str]) -> DictConfig:
    """verl's configuration for one command line, as :func:`composing`."""
    with composing() as compose_one:
        return compose_one(overrides)


def validate(config: DictConfig) -> None:
    """verl's own checks and this project's, but for those of files which a run on another machine
    may have.

    Raises:
        ValueError, AssertionError: what verl's ``main_ppo`` would refuse before it starts Ray.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from capo_verl.plugin.checks.before_start import check_config

    check_config(config)
    for problem in files.model_problems(config):
        raise ValueError(problem)
    # Behind the hook of this project's plugin, which checks files as well.
    unchecked = getattr(validate_config, "__wrapped__", validate_config)
    unchecked(config, need_reference_policy(config), need_critic(config))


def look_at_files(config: DictConfig) -> list[str]:
    """Notes on the files of a run: how many rows were read or, unless the dry run is strict, what a
    run on this machine would be refused for.

    Raises:
        ValueError: in a strict dry run, for what a run on this machine is refused for.
    """
    if not _is_strict():
        return [*files.cache_problems(config), *data.read_data(config)[0]]
    notes = files.check_files(config)
    identity.check_identity(config)
    return notes


def plan(config: DictConfig) -> tuple[str, list[str]]:
    """The plan as text, or why there is none; and notes.

    Raises:
        ValueError: if the run cannot fit, unless ``CAPO_PLAN=note`` makes that a note.
    """
    on_misfit = os.environ.get("CAPO_PLAN") or "refuse"
    if on_misfit not in ("refuse", "note"):
        raise ValueError(f"CAPO_PLAN={on_misfit}: choose one of refuse, note")
    run = run_spec.from_config(config, on_cpu())
    if run.engine not in PLANNED:
        return f"No plan for actor_rollout_ref.actor.strategy={run.engine}.", []
    try:
        shape = find_shape(run.model)
    except ValueError as e:
        return f"No plan: {e}.", []
    if shape is None:
        return (
            f"No plan: the sizes of {run.model} are not known here; `capo-verl plan` takes them as "
            "arguments.",
            [],
        )
    memory, notes = (machine_memory(), []) if run.cpu else gpu_memory(look=_is_strict())
    made = make_plan(run, shape, memory, must_fit=on_misfit == "refuse")
    misfit = made.misfit()
    return made.table(), [*notes, misfit] if misfit else notes


def _is_strict() -> bool:
    return os.environ.get("DRY_RUN") == "strict"


def dry_run(overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Text for standard output, and notes.

    Raises:
        ValueError, AssertionError, hydra.errors.HydraException: in one sentence, why the run is
            refused.
    """
    with contextlib.redirect_stdout(sys.stderr):  # verl's checks print
        config = compose(overrides)
        validate(config)
        notes = look_at_files(config)
    table, more = plan(config)
    planned = "".join(f"# {line}\n" for line in table.splitlines())
    return OmegaConf.to_yaml(config, resolve=True) + planned, [*notes, *more]


def main(argv: Sequence[str] | None = None) -> int:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        printed, notes = dry_run(sys.argv[1:] if argv is None else argv)
    except (ValueError, AssertionError, RuntimeError, HydraException, OmegaConfBaseException) as e:
        print(refusal(e), file=sys.stderr)
        return REFUSED
    print(printed, end="")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
