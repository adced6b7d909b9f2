# SPDX-License-Identifier: Apache-2.0
"""CAPO's part of verl's checkpoints: moments, and the state of whatever adapts."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from capo_verl.config import CapoConfig, TargetRejection
from capo_verl.core.kl_budget import is_scale
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


class Loaded(NamedTuple):
    """Contents of a checkpoint, until a training step takes them over."""

    checkpoint: str = ""
    """Its folder; empty if there was none."""
    control: checkpoint_files.Control | None = None
    state: State | None = None


class _Part(NamedTuple):
    """One thing that continues from a part of a file."""

    path: Path
    check: Callable[[Any], None]
    load: Callable[[Any], None]
    state: Any


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
    _loaded = Loaded()

    def _save_state(self, checkpoint: str, state: State) -> None:
        """Write the moments below the folder ``checkpoint``. Collective over all ranks."""
        raise NotImplementedError

    def _load_state(self, checkpoint: str) -> State | None:
        """This rank's moments, on any device; None if the checkpoint was written without CAPO.

        Collective.
        """
        raise NotImplementedError

    def _state_path(self, checkpoint: str) -> Path:
        """File or folder of the moments below the folder ``checkpoint``, in its folder ``capo``."""
        raise NotImplementedError

    def _optimizer_steps(self) -> int:
        raise NotImplementedError

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        # First, because verl marks a checkpoint as complete at the end of its own save.
        moments = self._keeps_moments(self._capo)
        if moments:
            self._save_state(local_path, {} if self._step is None else self._step.capo.state_dict())
        elif self._loaded.state is not None:  # not yet taken over by a training step
            self._save_state(local_path, self._loaded.state)
        control = self._loaded.control
        if self._capo is not None:
            control = checkpoint_files.gather(
                moments or self._loaded.state is not None,
                None if self._kl is None else self._kl.budget.state_dict(),
                {} if self._step is None else self._step.capo.adaptive_state(),
            )
        if control is not None:
            checkpoint_files.save(local_path, control)
        super().save_checkpoint(local_path, *args, **kwargs)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        # First, so that nothing has changed if it cannot be used.
        control = checkpoint_files.load(local_path)
        loaded = Loaded(local_path, control, self._load_state(local_path))
        if control is not None and control.moments and loaded.state is None:
            raise checkpoint_files.unusable(self._state_path(local_path), "it is missing")
        parts = [] if self._capo is None else self._checked_parts(self._capo, loaded)
        super().load_checkpoint(local_path, *args, **kwargs)
        # verl restores Megatron's scheduler only with
        # optim.use_checkpoint_opt_param_scheduler=True. Its trainer takes the step from the name of
        # the folder as well.
        names = re.findall(r"global_step_(\d+)", local_path)
        self._steps_before = int(names[-1]) if names and not self._optimizer_steps() else 0
        self._loaded = loaded
        if self._capo is not None:
            self._take_over(self._capo, parts)

    @staticmethod
    def _keeps_moments(config: CapoConfig | None) -> bool:
        return config is not None and config.mode != "off" and config.optimizer_model == "adam"

    def _take_over_loaded(self, config: CapoConfig) -> None:
        """Continue from what was loaded, all of it or nothing. Collective over all ranks.

        Raises:
            RuntimeError: as :meth:`_checked_parts`.
        """
        if self._loaded.checkpoint:
            self._take_over(config, self._checked_parts(config, self._loaded))

    def _checked_parts(self, config: CapoConfig, loaded: Loaded) -> list[_Part]:
        """State that continues on this rank. Collective over all ranks.

        Raises:
            RuntimeError: on every rank, if any of it cannot be taken over on any.
        """
        control_path = checkpoint_files.path_of(loaded.checkpoint)
        state_path = self._state_path(loaded.checkpoint)
        parts: list[_Part] = []
        control, state = loaded.control, loaded.state
        if self._kl is not None and control is not None and control.kl_budget is not None:
            budget = self._kl.budget
            parts.append(
                _Part(
                    control_path, budget.check_state_dict, budget.load_state_dict, control.kl_budget
                )
            )
        if self._step is not None:
            capo, keeps = self._step.capo, self._keeps_moments(config)
            # The threshold is on the scale of the moments.
            if control is not None and control.filter and not (keeps and state is None):
                parts.append(
                    _Part(
                        control_path,
                        capo.check_adaptive_state,
                        capo.load_adaptive_state,
                        control.filter,
                    )
                )
            if keeps and state is not None:
                parts.append(_Part(state_path, capo.check_state_dict, capo.load_state_dict, state))
        for path in (control_path, state_path):
            checks = [partial(part.check, part.state) for part in parts if part.path == path]
            checkpoint_files.together(partial(_call, checks), path, checkpoint_files.unusable)
        return parts

    def _take_over(self, config: CapoConfig, parts: list[_Part]) -> None:
        for part in parts:
            part.load(part.state)
        loaded, taken = self._loaded, [part.state for part in parts]
        keeps = self._keeps_moments(config)
        self._loaded = Loaded(loaded.checkpoint, None, None if keeps else loaded.state)
        budget = None if loaded.control is None else loaded.control.kl_budget
        if self._kl is not None and (budget is None or is_scale(budget)):
            logger.warning(
                "the checkpoint %s holds no state of a KL budget, or one of a release before 0.2: "
                "the learning rate is found anew, from a short step",
                loaded.checkpoint,
            )
        if self._step is None:
            return
        if keeps and loaded.state is None:
            logger.warning(
                "the checkpoint %s was written without CAPO: its moments start empty",
                loaded.checkpoint,
            )
        adaptive = None if loaded.control is None else loaded.control.filter
        if isinstance(config.policy_shift_max, TargetRejection) and "policy_threshold" in (
            adaptive or {}
        ):
            logger.warning(
                "the checkpoint %s holds a threshold of a release before 0.2, which does not say "
                "for which learning rate: it is found anew, from the second step on",
                loaded.checkpoint,
            )
        if self._step.capo.adaptive_state() and not any(state is adaptive for state in taken):
            logger.warning(
                "the checkpoint %s holds no adaptive threshold or guard: they start anew",
                loaded.checkpoint,
            )


def _call(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()
