# SPDX-License-Identifier: Apache-2.0
"""Where an engine of verl meets the filter: everything that does not depend on which engine it is,
checkpoints aside.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils.device import get_device_id

from capo_verl.config import CapoConfig
from capo_verl.core import CapoFilter
from capo_verl.engines.checkpoint import CapoCheckpointMixin
from capo_verl.engines.filter_step import FilteredStep
from capo_verl.engines.kl_control import KLControl
from capo_verl.engines.kl_probe import Head
from capo_verl.engines.lm_head import HiddenStatesTap
from capo_verl.engines.nonfinite import Health, describe
from capo_verl.engines.response import SAMPLE

logger = logging.getLogger(__name__)


def capo_config_of(loss_function: Any) -> CapoConfig | None:
    """The knobs which verl's worker bound to its loss function, if the run was started with
    ``+capo``.
    """
    config = getattr(loss_function, "keywords", {}).get("config")
    knobs = getattr(getattr(config, "policy_loss", None), "capo", None)
    return knobs if isinstance(knobs, CapoConfig) else None


class CapoEngineMixin(CapoCheckpointMixin):
    """Put before a language-model engine of verl, it filters tokens while the engine trains.

    Without ``+capo`` on the command line every method hands over to verl's at once. The engine
    class supplies the methods marked *engine*, and calls ``self._step.evaluate`` where it has
    hidden states and logits (or the LM head) of a micro-batch.
    """

    _capo: CapoConfig | None = None
    """The knobs, once a training step has come with them; known on every rank."""
    _step: FilteredStep | None = None
    """Only on ranks that hold the LM head."""
    _tap: HiddenStatesTap | None = None
    """Likewise."""
    _kl: KLControl | None = None
    """With ``capo.kl_budget``, on every rank."""
    _health: Health
    _measures = True
    """Whether the training step in progress is one which CAPO looks at (``capo.track_every``)."""
    _skip_batch = False
    _filter_seconds = 0.0

    # ---- engine: what each one supplies ----

    def _make_filter(
        self, config: CapoConfig, device: torch.device
    ) -> tuple[CapoFilter, HiddenStatesTap] | None:
        """The filter for this rank's part of the LM head and the tap on that; None if the rank
        holds none.
        """
        raise NotImplementedError

    def _learning_rate(self) -> float:
        """Of the coming optimizer step."""
        raise NotImplementedError

    def _optimizer_steps(self) -> int:
        """Steps of the learning-rate scheduler so far: verl's training steps, of one optimizer step
        per mini-batch and epoch.
        """
        raise NotImplementedError

    def _gradients(self) -> Iterable[Tensor]:
        """This rank's gradients after the last micro-batch."""
        raise NotImplementedError

    def _head(self) -> Head | None:
        """This rank's part of the LM head, None if it holds none.

        Raises:
            ValueError: if the engine leaves out optimizer steps of which CAPO does not know.
        """
        raise NotImplementedError

    def _watch_head(self) -> None:
        """From now on show the KL probe, while it ``sees_head``, each call of this rank's LM head
        in half precision.
        """
        raise NotImplementedError

    def _evaluating(self) -> Any:
        """See :class:`capo_verl.engines.kl_control.ProbedEngine`, likewise the next three."""
        raise NotImplementedError

    def _micro_batch_groups(self) -> int:
        return 1

    def _optimised(self) -> list[Tensor]:
        raise NotImplementedError

    def _spread_parameters(self) -> None:
        raise NotImplementedError

    def _check_line_search(self) -> None:
        """
        Raises:
            ValueError: if the optimizer keeps parameters where a step back would not reach them.
        """

    @property
    def _filtering(self) -> bool:
        """Whether a training step with CAPO is under way on a rank that holds the LM head."""
        return self._step is not None and self._tap is not None and self._tap.active

    @property
    def _probing(self) -> bool:
        """Whether a forward pass is under way that the KL probe wants to see, on a rank that holds
        the LM head.
        """
        return self._kl is not None and self._kl.probe.sees_logits

    def _scaled_learning_rate(self) -> float:
        """Of the coming optimizer step, as far as it is known before the training pass."""
        return self._learning_rate() * (1.0 if self._kl is None else self._kl.scale)

    # ---- one training step ----

    def train_batch(self, data: TensorDict, loss_function: Any) -> Any:
        config = capo_config_of(loss_function)
        if config is not None and self._capo is None:
            self._switch_on(config)
        control = None if config is None else self._kl
        if control is not None:
            control.before(data)
        output = super().train_batch(data, loss_function)
        if control is not None:
            metrics = control.after()
            if self.is_mp_src_rank_with_outputs():
                output["metrics"].update(metrics)
        if self._step is not None and self._measures and self.is_mp_src_rank_with_outputs():
            output["metrics"]["capo/filter_seconds"] = [self._filter_seconds]
        return output

    def forward_backward_batch(
        self, data: TensorDict, loss_function: Any, forward_only: bool = False
    ) -> Any:
        config = None if forward_only else capo_config_of(loss_function)
        if config is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        if self._capo is None:
            self._switch_on(config)
        steps_so_far = self._training_steps()
        self._measures = config.mode != "off" and config.measures(steps_so_far)
        watch = (lambda loss: loss) if self._kl is None else self._kl.watch
        if not self._measures:
            return super().forward_backward_batch(data, watch(loss_function), forward_only)
        self._health.clear()
        step = self._step
        if step is None or self._tap is None:
            output = super().forward_backward_batch(data, watch(loss_function), forward_only)
        else:
            step.begin(steps_so_far)
            if config.kl_budget is not None and config.kl_budget.predicts_by_curvature:
                step.capo.keep_for_batch_shifts = True
            if config.optimizer_model == "adam":
                group = self.optimizer.param_groups[0]
                step.capo.set_optimizer(group["betas"], group["eps"])
            data[SAMPLE] = torch.arange(len(data), device=data.device)
            self._tap.active = True
            try:
                output = super().forward_backward_batch(
                    data, watch(step.wrap_loss(loss_function)), forward_only
                )
            finally:
                self._tap.active = False
                del data[SAMPLE]
        self._agree_to_step(config)
        reported: dict[str, float] = {}
        if step is not None:
            metrics = {"capo/batch_skipped": float(self._skip_batch)}
            if not self._skip_batch:
                reported = step.metrics()
                metrics |= reported
            # Lists, because verl's reduction expects one value per micro-batch.
            output["metrics"].update({name: [value] for name, value in metrics.items()})
        if self._kl is not None and not self._skip_batch:
            self._kl.predict(step, reported)
        return output

    def optimizer_zero_grad(self) -> None:
        super().optimizer_zero_grad()
        if self._step is not None:
            self._step.discard()

    def optimizer_step(self) -> Any:
        if self._skip_batch:
            self._skip_batch = False
            if self._kl is not None:
                self._kl.end_awaited(usable=False)
            if self._step is not None:
                self._filter_seconds = self._step.seconds()
            self.optimizer_zero_grad()
            return 0.0
        if self._kl is not None:
            self._kl.end_awaited()
        with nullcontext() if self._kl is None else self._kl.scaled():
            grad_norm = super().optimizer_step()
        if self._kl is not None and isinstance(grad_norm, float) and not math.isfinite(grad_norm):
            self._kl.cancel()  # FSDP leaves such a step out
        if self._step is not None and self._measures:
            self._filter_seconds = self._step.optimizer_step()
        return grad_norm

    def to(
        self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True
    ) -> None:
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if optimizer and self._step is not None:
            self._step.capo.to("cpu" if device == "cpu" else torch.device(get_device_id()))

    def _training_steps(self) -> int:
        """So far, including those before a resume."""
        return self._steps_before + self._optimizer_steps()

    def _agree_to_step(self, config: CapoConfig) -> None:
        """All ranks learn whether any of them met NaN or infinity; then all stop, or all skip the
        optimizer step.

        Raises:
            RuntimeError: on every rank, naming rank and sample, with ``on_nonfinite=error``.
        """
        self._health.note_gradients(self._gradients())
        findings = self._health.agree(dist.group.WORLD)
        self._skip_batch = bool(findings)
        if not findings:
            return
        what = describe(findings, self._training_steps() + 1)
        if config.on_nonfinite == "error":
            raise RuntimeError(
                f"{what}. Nothing was updated. Resume from the last checkpoint; "
                "actor_rollout_ref.actor.policy_loss.capo.on_nonfinite=skip_batch would leave such "
                "batches out"
            )
        if dist.get_rank() == findings[0].rank:
            logger.warning(
                "%s. Skipped: neither weights nor moments move (capo.on_nonfinite=skip_batch)", what
            )

    def _switch_on(self, config: CapoConfig) -> None:
        """The first training step says that this run is a CAPO run. Called on every rank."""
        self._capo = config
        device = torch.device(get_device_id())
        self._health = Health(device)
        made = None if config.mode == "off" else self._make_filter(config, device)
        if made is not None:
            capo, self._tap = made
            self._step = FilteredStep(capo, config, device, self._health)
            self._step.samples.tokenizer = getattr(
                getattr(self, "model_config", None), "tokenizer", None
            )
        if config.kl_budget is not None:
            if config.kl_budget.line_search is not None:
                self._check_line_search()
            head = self._head()
            self._kl = KLControl(self, config, head, device)
            if head is not None:
                self._watch_head()
        if self._loaded_from is not None:
            self._take_over_loaded_state(config)
