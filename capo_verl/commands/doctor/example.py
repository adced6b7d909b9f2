# SPDX-License-Identifier: Apache-2.0
"""The launcher that was named: what its dry run resolves to, and whether there is room for that."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from capo_verl.commands.doctor import disk, driver, memory
from capo_verl.commands.doctor.answering_process import last_line
from capo_verl.commands.doctor.check import OK, WARN, Broken, Outcome
from capo_verl.commands.doctor.machine import Machine
from capo_verl.launch.hardware import VARIABLE
from capo_verl.launch.plan import Plan, make_plan
from capo_verl.plugin.checks.model_shape import find_shape
from capo_verl.plugin.checks.run_spec import ACTOR, RunSpec, from_config
from capo_verl.plugin.checks.sizes import PLANNED

SECONDS = 300.0
NOTE = "note: "


class Example:
    """A launcher with its overrides. Its dry run is made once, when first needed.

    Args:
        script: a launcher such as ``examples/run_quickstart_cpu.sh``.
        overrides: Hydra overrides for it; its environment variables are those of this process.
        here: the machine.
    """

    def __init__(self, script: Path, overrides: Sequence[str], here: Machine):
        self._script, self._overrides, self._here = script, list(overrides), here

    @functools.cached_property
    def _done(self) -> subprocess.CompletedProcess[str]:
        # The launchers for CPUs set VERL_PLATFORM; whoever looks at one for GPUs from a machine
        # without will run it elsewhere.
        inherited = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
        environment = {**inherited, "DRY_RUN": "1", "CAPO_PLAN": "note", "PYTHON": sys.executable}
        environment[VARIABLE] = str(self._here.gpu_memory)
        if Path(
            sys.prefix, "bin/python"
        ).exists():  # a launcher that makes an environment takes this one
            environment |= {"CAPO_VENV": sys.prefix, "CAPO_SKIP_INSTALL": "1"}
        return subprocess.run(
            ["bash", str(self._script), *self._overrides],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip

    @property
    def resolves(self) -> bool:
        return self._done.returncode == 0

    @functools.cached_property
    def config(self) -> DictConfig:
        """verl's whole configuration; only if it resolves."""
        config = OmegaConf.create(self._done.stdout)
        assert isinstance(config, DictConfig)
        return config

    @functools.cached_property
    def run(self) -> RunSpec:
        return from_config(
            self.config, cpu=OmegaConf.select(self.config, "actor_rollout_ref.rollout.name") == "hf"
        )

    @functools.cached_property
    def plan(self) -> Plan | None:
        """Its memory on GPUs like this machine's; None if there is none for this engine or the
        sizes of this model.
        """
        try:
            shape = find_shape(self.run.model)
        except ValueError:  # of a kind that is not planned
            shape = None
        if shape is None or self.run.engine not in PLANNED:
            return None
        return make_plan(
            self.run,
            shape,
            self._here.memory if self.run.cpu else self._here.gpu_memory,
            must_fit=False,
        )

    def look(self) -> Outcome:
        """Resolve the dry run; what a run here would be refused for, such as missing data, is a
        warning.
        """
        if not self.resolves:
            raise Broken(
                "the dry run is refused: "
                f"{last_line(self._done.stderr) or f'exit code {self._done.returncode}'}"
            )
        if self.run.engine == "megatron" and (self.run.cpu or self._here.gpus):
            vanilla = bool(OmegaConf.select(self.config, f"{ACTOR}.megatron.vanilla_mbridge"))
            problem = driver.bridge_problem(vanilla)
            if problem:
                raise Broken(f"{self._script.name} resolves, but {problem}")
        lines = self._done.stderr.splitlines()
        notes = [line.removeprefix(NOTE) for line in lines if line.startswith(NOTE)]
        notes = [
            note for note in notes if self.plan is None or note != self.plan.misfit()
        ]  # another check's
        capo = OmegaConf.select(self.config, "actor_rollout_ref.actor.policy_loss.capo.preset")
        what = f"{self._script.name} resolves{f' with +capo={capo}' if capo else ', without +capo'}"
        if notes:
            more = f" (and {len(notes) - 1} more: DRY_RUN=1 tells)" if len(notes) > 1 else ""
            return Outcome(WARN, f"{what}, but would not start here: {notes[0]}{more}")
        return Outcome(OK, what)

    def memory(self) -> Outcome:
        """Compare its memory with this machine's (:mod:`capo_verl.commands.doctor.memory`)."""
        return memory.compare(self.plan, self.run.model, self._here)

    def disk(self) -> Outcome:
        """Compare its checkpoints with the disk (:mod:`capo_verl.commands.doctor.disk`)."""
        return disk.compare(self.plan, self.config, on_the_spot=self.run.cpu or self._here.gpus > 0)
