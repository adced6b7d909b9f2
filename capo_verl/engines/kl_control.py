# SPDX-License-Identifier: Apache-2.0
"""One optimizer step under a KL budget: look, step at a scaled learning rate, look again.

Every rank comes to the same scale: what is measured is made known to all before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.core.kl_budget import STEPS_BACK, KLBudget
from capo_verl.engines.kl_probe import AFTER, BEFORE, KLProbe, MeasuredKL, probe_batch
from capo_verl.engines.lm_head import LMHead
from capo_verl.engines.timer import Timer

logger = logging.getLogger(__name__)

AT_THE_FLOOR = (
    "the KL budget has brought the learning rate down to capo.kl_budget.scale_min=%g of yours, and "
    "a step still measures a KL of %.1e, above capo.kl_budget.delta=%g: the policy hardly trains. "
    "In half precision the rounding of activations alone may measure that much "
    "(docs/interventions.md): set delta to a few times what capo/kl_mean shows at a tiny learning "
    "rate"
)


class ProbedEngine(Protocol):
    """The part of an engine that the control drives."""

    optimizer: Any

    def infer_batch(self, data: TensorDict, loss_function: Any = None) -> Any: ...

    def _evaluating(self) -> AbstractContextManager[None]:
        """A context in which the model is in evaluation mode.

        Afterwards it trains, and holds no gathered copies of sharded weights.
        """

    def _micro_batch_groups(self) -> int:
        """The number of which the number of micro-batches has to be a multiple."""

    def _optimised(self) -> list[Tensor]:
        """The tensors that this rank's optimizer writes to, in an order that does not change."""

    def _spread_parameters(self) -> None:
        """Make the model follow after the tensors of :meth:`_optimised` were written to.

        Collective.
        """


class KLControl:
    """The controller, and what is known of the optimizer step in progress.

    Args:
        engine: whose optimizer it is.
        config: CAPO's knobs, with a KL budget.
        head: this rank's part of the LM head, if it holds one.
        device: where the training runs.

    Attributes:
        stepped: True once the optimizer has made its step; the engine sets it.
    """

    def __init__(
        self, engine: ProbedEngine, config: CapoConfig, head: LMHead | None, device: torch.device
    ):
        assert config.kl_budget is not None
        self._engine, self.config = engine, config.kl_budget
        self.budget = KLBudget(self.config)
        self.probe = KLProbe(head, self.config.estimator, device)
        self._timer = Timer(device)
        self._warned = False
        self._batch: TensorDict | None = None
        self._before_step: list[Tensor] | None = None
        self._metrics: dict[str, list[float]] = {}
        self.stepped = False

    def before(self, data: TensorDict) -> None:
        """Look at the policy before a mini-batch is trained on. On every rank."""
        self._metrics, self.stepped = {}, False
        self._timer.reset()
        groups = self._engine._micro_batch_groups()
        self._batch = probe_batch(data, self.config.probe_share, groups)
        self._look(BEFORE)

    @contextmanager
    def scaled(self) -> Iterator[None]:
        """A context around a training step, in which the optimizer's learning rates are scaled.

        Whoever asks for the coming step's learning rate reads it there. Afterwards they are as
        before, bit for bit.
        """
        groups = self._engine.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        factor = self.budget.begin_step()
        for group in groups:
            group["lr"] = group["lr"] * factor
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def keep_parameters(self) -> None:
        """Copy what the optimizer is about to change, if the step may have to be shortened."""
        if self.config.line_search is not None:
            self._before_step = [x.detach().clone() for x in self._engine._optimised()]

    def after(self) -> dict[str, list[float]]:
        """Look again, step back if needed, learn. Collective over all ranks.

        Returns:
            The metrics, the same on all ranks.
        """
        if self.stepped:
            self._report(lr_scale=self.budget.scale)
            self._measure()
        self._report(kl_budget_scale=self.budget.scale, kl_probe_seconds=self._timer.seconds())
        self._batch, self._before_step = None, None
        self.probe.discard()
        return self._metrics

    def _report(self, **metrics: float) -> None:
        for name, value in metrics.items():
            self._metrics.setdefault(f"capo/{name}", []).append(value)

    def _measure(self) -> None:
        kl = whole = self._look(AFTER)
        kept = 1.0
        for _ in range(STEPS_BACK):
            keep = self.budget.needs_line_search(kl.mean) if kl.tokens else None
            if keep is None:
                break
            self._step_back(keep)
            kept *= keep
            kl = self._look(AFTER)
        if self.config.line_search is not None:
            self._report(kl_step_kept=kept)
            if whole.tokens:
                self._report(kl_whole_step=whole.mean)
        if not whole.tokens:
            return
        # From the whole step, which is what the learning rate made.
        self.budget.end_step(whole.mean)
        self._warn_at_the_floor(whole)
        self._report(kl_mean=kl.mean, kl_p99=kl.p99)

    def _warn_at_the_floor(self, kl: MeasuredKL) -> None:
        """Warn once: a run at the floor hardly trains, and nothing else would say so."""
        at_floor = self.budget.scale <= self.config.scale_min and kl.mean > self.config.delta
        if self._warned or not at_floor:
            return
        self._warned = True
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning(AT_THE_FLOOR, self.config.scale_min, kl.mean, self.config.delta)

    def _look(self, which: str) -> MeasuredKL:
        assert self._batch is not None
        with self._timer.running():
            self._pass(which)
            if which == BEFORE and self.probe.settle():
                self._pass(which)
            return self.probe.result() if which == AFTER else MeasuredKL(0.0, 0.0, 0)

    def _pass(self, which: str) -> None:
        with self._engine._evaluating(), self.probe.running(which):
            self._engine.infer_batch(self._batch, self.probe.loss_function)

    @torch.no_grad()
    def _step_back(self, keep: float) -> None:
        """Go to ``old + keep * (new - old)``.

        The optimizer's moments stay those of the whole step.
        """
        assert self._before_step is not None
        for now, old in zip(self._engine._optimised(), self._before_step, strict=True):
            now.copy_(old + keep * (now - old))
        self._engine._spread_parameters()
