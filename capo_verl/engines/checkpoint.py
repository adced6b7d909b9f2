# SPDX-License-Identifier: Apache-2.0
"""CAPO's part of verl's checkpoints: moments, and the state of whatever adapts."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from capo_verl.config import CapoConfig
from capo_verl.engines import checkpoint_files
from capo_verl.engines.filter_step import FilterStep
from capo_verl.engines.kl_control import KLControl

if TYPE_CHECKING:
    from verl.workers.engine.base import BaseEngine
else:
    BaseEngine = object  # the engine class brings verl's

logger = logging.getLogger(__name__)

State = dict[str, Any]
"""``CapoFilter.state_dict()``; empty on ranks that hold no LM head."""


class CapoCheckpointMixin(BaseEngine):
    """The checkpoint part of :class:`capo_verl.engines.mixin.CapoEngineMixin`.

    What is loaded waits for the first training step, which says whether this is a run with CAPO;
    saved before that, it is handed on as it was.
    """

    _capo: CapoConfig | None
    _step: FilterStep | None
    _kl: KLControl | None
    _steps_before: int = 0
    """Training steps before a resume which the learning-rate scheduler does not know of."""
    _loaded_from: str | None = None
    _loaded_state: State | None = None
    _loaded_control: checkpoint_files.Control | None = None

    def _save_state(self, checkpoint: str, state: State) -> None:
        """Write the moments below the folder ``checkpoint``. Collective over all ranks."""
        raise NotImplementedError

    def _load_state(self, checkpoint: str) -> State | None:
        """This rank's moments, on any device; None if the checkpoint was written without CAPO.

        Collective.
        """
        raise NotImplementedError

    def _optimizer_steps(self) -> int:
        raise NotImplementedError

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        # First, because verl marks a checkpoint as complete at the end of its own save.
        moments = self._keeps_moments(self._capo)
        if moments:
            self._save_state(local_path, {} if self._step is None else self._step.capo.state_dict())
        elif self._loaded_state is not None:  # not yet taken over by a training step
            self._save_state(local_path, self._loaded_state)
        control = self._loaded_control
        if self._capo is not None:
            control = checkpoint_files.gather(
                moments or self._loaded_state is not None,
                None if self._kl is None else self._kl.budget.state_dict(),
                {} if self._step is None else self._step.capo.adaptive_state(),
            )
        if control is not None:
            checkpoint_files.save(local_path, control)
        super().save_checkpoint(local_path, *args, **kwargs)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        super().load_checkpoint(local_path, *args, **kwargs)
        # verl restores Megatron's scheduler only with
        # optim.use_checkpoint_opt_param_scheduler=True. Its trainer takes the step from the name of
        # the folder as well.
        names = re.findall(r"global_step_(\d+)", local_path)
        self._steps_before = int(names[-1]) if names and not self._optimizer_steps() else 0
        self._loaded_from = local_path
        self._loaded_control = checkpoint_files.load(local_path)
        self._loaded_state = self._load_state(local_path)
        if self._capo is not None:
            self._take_over_loaded_state(self._capo)

    @staticmethod
    def _keeps_moments(config: CapoConfig | None) -> bool:
        return config is not None and config.mode != "off" and config.optimizer_model == "adam"

    def _take_over_loaded_state(self, config: CapoConfig) -> None:
        self._take_over_loaded_control()
        if not self._keeps_moments(config):
            return  # whatever was loaded is saved again
        state, self._loaded_state = self._loaded_state, None
        if self._step is None:
            return
        if state is None:
            logger.warning(
                "the checkpoint %s was written without CAPO: its moments start empty",
                self._loaded_from,
            )
            return
        self._step.capo.load_state_dict(state)

    def _take_over_loaded_control(self) -> None:
        control, self._loaded_control = self._loaded_control, None
        if self._kl is not None:
            if control is None or control.kl_budget is None:
                logger.warning(
                    "the checkpoint %s holds no state of a KL budget: the learning rate starts at "
                    "its full value",
                    self._loaded_from,
                )
            else:
                self._kl.budget.load_state_dict(control.kl_budget)
        if self._step is not None and control is not None and control.filter:
            self._step.capo.load_adaptive_state(control.filter)
        elif self._step is not None and self._step.capo.adaptive_state():
            logger.warning(
                "the checkpoint %s holds no adaptive threshold or guard: they start anew",
                self._loaded_from,
            )
