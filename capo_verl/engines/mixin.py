# SPDX-License-Identifier: Apache-2.0
"""One training step of an engine of verl with CAPO, the same for all engines."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils.device import get_device_id

from capo_verl.config import CapoConfig
from capo_verl.core import collectives
from capo_verl.engines.checkpoint import CapoCheckpointMixin
from capo_verl.engines.filter_step import FilterStep
from capo_verl.engines.kl_control import KLControl
from capo_verl.engines.kl_probe import PROBED, KLProbe
from capo_verl.engines.lm_head import HiddenStatesTap, LMHead, LMHeadCall, watch_half_precision
from capo_verl.engines.nonfinite import NonFinite, describe
from capo_verl.engines.response import SAMPLE, without_other_voices

logger = logging.getLogger(__name__)


def capo_config_of(loss_function: Any) -> CapoConfig | None:
    """The knobs that verl's worker bound to its loss function, if the run has ``+capo``."""
    config = getattr(loss_function, "keywords", {}).get("config")
    knobs = getattr(getattr(config, "policy_loss", None), "capo", None)
    return knobs if isinstance(knobs, CapoConfig) else None


def has_dropout(modules: Iterable[nn.Module]) -> bool:
    """True if a layer in any of the modules is a dropout that drops something."""
    return any(
        isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0
        for module in modules
        for layer in module.modules()
    )


class CapoEngineMixin(CapoCheckpointMixin):
    """CAPO for a language-model engine of verl: put before it, it filters tokens in training.

    Without ``+capo`` on the command line every method hands over to verl's at once. The engine
    class supplies the methods marked *engine*, and calls ``self._step.evaluate`` where it has
    hidden states and logits (or the LM head) of a micro-batch.
    """

    _capo: CapoConfig | None = None
    """The knobs, once a training step has come with them; known on every rank."""
    _step: FilterStep | None = None
    """Only on ranks that hold the LM head."""
    _kl: KLControl | None = None
    """With ``capo.kl_budget``, on every rank."""
    _nonfinite: NonFinite
    _measures = True
    """False in a training step at which CAPO does not look (``capo.track_every``)."""
    _skip_batch = False
    _filter_seconds = 0.0
    _probed: TensorDict | None = None
    """The micro-batch in flight, if the KL probe looks at it: the probed tokens are its response
    mask.
    """

    # ---- engine: what each one supplies ----

    def _find_lm_head(self) -> LMHead | None:
        """This rank's part of the LM head; None if the rank holds none."""
        raise NotImplementedError

    def _learning_rate(self) -> float:
        """The learning rate of the coming optimizer step."""
        raise NotImplementedError

    def _optimizer_steps(self) -> int:
        """Steps of the learning-rate scheduler so far: verl's training steps.

        One has an optimizer step per mini-batch and epoch.
        """
        raise NotImplementedError

    def _gradients(self) -> Iterable[Tensor]:
        """This rank's gradients after the last micro-batch."""
        raise NotImplementedError

    def _see_lm_head(self, call: LMHeadCall) -> None:
        """Hand a call of the LM head in half precision to the KL probe."""
        raise NotImplementedError

    verl_module: ModuleType
    """Part of :class:`capo_verl.engines.kl_control.ProbedEngine`, like the next five."""

    def _has_dropout(self) -> bool:
        raise NotImplementedError

    def _evaluating(self) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _micro_batch_groups(self) -> int:
        return 1

    def _optimised(self) -> list[Tensor]:
        raise NotImplementedError

    def _spread_parameters(self) -> None:
        raise NotImplementedError

    def _check_supported(self, config: CapoConfig) -> None:
        """Look at the engine's optimizer before the first training step with CAPO.

        Raises:
            ValueError: if it leaves out steps that CAPO would count, or keeps parameters where a
                step back would not reach them.
        """

    @cached_property
    def lm_head(self) -> LMHead | None:
        """This rank's part of the LM head, found once; None if the rank holds none."""
        return self._find_lm_head()

    @property
    def _filtering(self) -> FilterStep | None:
        """The filter, while a training step with CAPO is under way and this rank holds the head."""
        return self._step if self._step is not None and self._step.tap.active else None

    @property
    def _kl_probe(self) -> KLProbe:
        assert self._kl is not None
        return self._kl.probe

    def _probed_part(self, batch: TensorDict) -> TensorDict | None:
        """The micro-batch with the probed tokens as its response mask; None if the KL probe does
        not look at it in the forward pass under way.
        """
        if self._kl is None or PROBED not in batch or not self._kl.probe.sees_logits:
            return None
        probed = batch.select(*batch.keys())
        probed["response_mask"] = batch[PROBED]
        return probed

    # ---- one training step ----

    def train_batch(self, data: TensorDict, loss_function: Any) -> Any:
        config = capo_config_of(loss_function)
        if config is not None and self._capo is None:
            self._switch_on(config)
        control = None if config is None else self._kl
        if control is None:
            output = super().train_batch(data, loss_function)
        else:
            with control.scaled(len(data) * self.get_data_parallel_size()):
                output = super().train_batch(data, loss_function)
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
        step = self._step if self._measures else None
        if self._measures:
            self._nonfinite.clear()
        if step is not None:
            step.begin(steps_so_far)
            if config.optimizer_model == "adam":
                group = self.optimizer.param_groups[0]
                step.capo.set_optimizer(group["betas"], group["eps"])
            loss_function = step.wrap_loss(loss_function)
            step.tap.active = True
        data = without_other_voices(data)
        data[SAMPLE] = torch.arange(len(data), device=data.device)
        try:
            if self._kl is None:
                output = super().forward_backward_batch(data, loss_function, forward_only)
            else:
                loss_function = self._kl.probe.wrap_loss(loss_function)
                with self._kl.training():
                    output = super().forward_backward_batch(data, loss_function, forward_only)
        finally:
            if step is not None:
                step.tap.active = False
        if not self._measures:
            return output
        self._agree_to_step(config)
        if step is not None:
            metrics = {"capo/batch_skipped": float(self._skip_batch)}
            if not self._skip_batch:
                metrics |= step.metrics()
            # Lists, because verl's reduction expects one value per micro-batch.
            output["metrics"].update({name: [value] for name, value in metrics.items()})
        return output

    def optimizer_zero_grad(self) -> None:
        super().optimizer_zero_grad()
        if self._step is not None:
            self._step.discard()

    def optimizer_step(self) -> Any:
        if self._skip_batch:
            self._skip_batch = False
            if self._step is not None:
                self._filter_seconds = self._step.seconds()
            self.optimizer_zero_grad()
            return 0.0
        if self._kl is not None:
            self._kl.before_step()
        grad_norm = super().optimizer_step()
        if self._kl is not None:
            self._kl.stepped = self._moved(grad_norm)
        if self._step is not None and self._measures:
            self._filter_seconds = self._step.optimizer_step()
        return grad_norm

    def _moved(self, grad_norm: Any) -> bool:
        """False after a step that FSDP left out, because its gradients are not finite, and after
        one without a gradient: what moves then is Adam's memory, whose KL says nothing of the next
        gradient's. Megatron has no norm without clipping.
        """
        if grad_norm is None or not self.optimizer_config.clip_grad:
            return True
        return math.isfinite(grad_norm) and float(grad_norm) > 0

    def to(
        self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True
    ) -> None:
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if optimizer and self._step is not None:
            self._step.capo.to("cpu" if device == "cpu" else torch.device(get_device_id()))

    def _training_steps(self) -> int:
        """Training steps so far, including those before a resume."""
        return self._steps_before + self._optimizer_steps()

    def _agree_to_step(self, config: CapoConfig) -> None:
        """Let all ranks learn of NaN or infinity on any, or of contradictory decisions: all stop,
        or all skip the optimizer step.

        Raises:
            RuntimeError: on every rank, naming rank and sample, with ``on_nonfinite=error``.
        """
        self._nonfinite.note_gradients(self._gradients())
        findings = self._nonfinite.agree(dist.group.WORLD)
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

    def _check_trains_everywhere(self, device: torch.device) -> None:
        """Let all ranks learn of one whose optimizer has no parameter groups: without a rate to
        read, verl would stop there, after the step. Groups may be empty.

        Raises:
            ValueError: on every rank, naming those.
        """
        nothing = torch.tensor([not self.optimizer.param_groups], device=device).byte()
        ranks = collectives.gather(nothing, dist.group.WORLD).nonzero()[:, 0].tolist()
        if ranks:
            raise ValueError(
                f"the optimizer has no parameter groups on rank {', '.join(map(str, ranks))}, so "
                "there is no learning rate to read: freeze fewer parameters, or choose another "
                "actor_rollout_ref.actor.megatron.pipeline_model_parallel_size"
            )

    def _switch_on(self, config: CapoConfig) -> None:
        """Make this a run with CAPO, at its first training step. Called on every rank."""
        device, head = torch.device(get_device_id()), self.lm_head
        self._check_trains_everywhere(device)
        self._check_supported(config)
        self._nonfinite = NonFinite(device, None if head is None else head.tp_group)
        if head is not None and config.mode != "off":
            capo = head.make_filter(config, device)
            tap = HiddenStatesTap(head.linear)
            self._step = FilterStep(capo, config, device, self._nonfinite, tap)
            self._step.samples.tokenizer = getattr(
                getattr(self, "model_config", None), "tokenizer", None
            )
        if config.kl_budget is not None:
            control = self._kl = KLControl(self, config, head, device)
            if head is not None:
                watch_half_precision(
                    head.module,
                    lambda: control.probe.sees_head and self._probed is not None,
                    self._see_lm_head,
                )
        self._take_over_loaded(config)
        self._capo = config
