# SPDX-License-Identifier: Apache-2.0
"""One optimizer step under a KL budget: train at the budget's learning rate, look again, learn.

Every rank comes to the same rate: what is measured is made known to all before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.core.kl_budget import RESOLVED, STEPS_BACK, KLBudget
from capo_verl.engines.kl_probe import AFTER, BEFORE, KLProbe, MeasuredKL, Selection, select
from capo_verl.engines.lm_head import LMHead
from capo_verl.engines.timer import Timer

logger = logging.getLogger(__name__)

BELOW_THE_FLOOR = (
    "the KL budget of a step, %.1e, is below what can be measured here: a policy that hardly moved "
    "measures %.1e (capo/kl_floor), the rounding of activations in half precision. KLs below %.1e "
    "are left out, and the learning rate keeps to those measured before. A capo.kl_budget.delta "
    "above the floor, or override_transformer_config.fp32_residual_connection=True, lets it follow"
)


_Split = Callable[..., tuple[Any, Any]]
"""A function like verl's ``prepare_micro_batches``."""


class ProbedEngine(Protocol):
    """The part of an engine that the control drives."""

    optimizer: Any
    optimizer_config: Any
    verl_module: ModuleType
    """Module in which verl's engine finds its ``prepare_micro_batches``."""

    def infer_batch(self, data: TensorDict, loss_function: Any = None) -> Any: ...

    def _learning_rate(self) -> float: ...

    def _training_steps(self) -> int: ...

    def _has_dropout(self) -> bool:
        """True if a forward pass in training draws random numbers, or is otherwise not the one of
        evaluation mode.
        """

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
        stepped: True once the optimizer has made its step, with a gradient; the engine sets it.
    """

    def __init__(
        self, engine: ProbedEngine, config: CapoConfig, head: LMHead | None, device: torch.device
    ):
        assert config.kl_budget is not None
        self._engine, self.config = engine, config.kl_budget
        self.budget = KLBudget(self.config)
        self._timer = Timer(device)
        self.probe = KLProbe(head, self.config.estimator, device, self._timer)
        self._random = engine._has_dropout()
        self._warned = False
        self._selection: Selection | None = None
        self._before_step: list[Tensor] | None = None
        self._metrics: dict[str, list[float]] = {}
        self._factor = 1.0
        self.stepped = False

    @contextmanager
    def scaled(self, completions: int) -> Iterator[None]:
        """A context around a training step, in which the optimizer's learning rates are the
        budget's.

        Args:
            completions: in the mini-batch, over all ranks.

        Whoever asks for the coming step's learning rate reads it there. Afterwards they are as
        before, bit for bit.
        """
        self._metrics, self.stepped, self._selection = {}, False, None
        self._timer.reset()
        scheduled, rates = self._engine._learning_rate(), self._rates()
        rate = self.budget.begin_step(
            scheduled, self._engine.optimizer_config.lr, self._progress(), completions
        )
        factor = self._factor = rate / scheduled if scheduled else 1.0
        self._set_rates([rate if each == scheduled else each * factor for each in rates])
        try:
            yield
        finally:
            self._set_rates(rates)

    def _rates(self) -> list[Any]:
        return [group["lr"] for group in self._engine.optimizer.param_groups]

    def _set_rates(self, rates: list[Any]) -> None:
        for group, rate in zip(self._engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _progress(self) -> float:
        """Part of the run that is over; 0 where its length is not known."""
        total = self._engine.optimizer_config.total_training_steps or 0
        return min(1.0, self._engine._training_steps() / (total - 1)) if total > 1 else 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        """A context around the forward and backward passes: chooses micro-batches, and keeps what
        the LM head makes of them. On every rank; collective at its end.
        """
        config, groups = self.config, self._engine._micro_batch_groups()

        def chosen(prepare: _Split, data: TensorDict, **kwargs: Any) -> tuple[Any, Any]:
            micro_batches, indices = prepare(data=data, **kwargs)
            self._selection = select(
                data, micro_batches, indices, config.probe_share, groups, self.probe.limit
            )
            return micro_batches, indices

        with self._split_by(chosen), self.probe.running(BEFORE):
            yield
        if self.probe.settle():
            self._selection = None  # what was kept cannot be compared with

    @contextmanager
    def _split_by(self, split: _Split) -> Iterator[None]:
        """A context in which ``split`` makes the micro-batches, given verl's function for it."""
        module: Any = self._engine.verl_module
        prepare = module.prepare_micro_batches
        module.prepare_micro_batches = partial(split, prepare)
        try:
            yield
        finally:
            module.prepare_micro_batches = prepare

    def before_step(self) -> None:
        """Keep what the optimizer is about to change, if it may be needed. On every rank."""
        if self._random and self._selection is not None:
            # The training drew random numbers: look at the same policy without.
            with self._timer.running():
                self._pass(BEFORE)
        if self.config.line_search is not None:
            self._before_step = [x.detach().clone() for x in self._engine._optimised()]

    def after(self) -> dict[str, list[float]]:
        """Look again, step back if needed, learn. Collective over all ranks.

        Returns:
            The metrics, the same on all ranks.
        """
        if self.stepped:
            self._report(lr=self.budget.rate_now, lr_scale=self._factor, kl_delta=self.budget.delta)
            if self._selection is not None:
                self._measure()
        for name in ("curvature", "floor"):
            value = getattr(self.budget, name)
            if value is not None:
                self._report(**{f"kl_{name}": value})
        self._report(kl_probe_seconds=self._timer.seconds())
        self._selection, self._before_step = None, None
        self.probe.discard()
        return self._metrics

    def _report(self, **metrics: float) -> None:
        for name, value in metrics.items():
            self._metrics.setdefault(f"capo/{name}", []).append(value)

    def _measure(self) -> None:
        kl = whole = self._look()
        kept = 1.0
        for _ in range(STEPS_BACK):
            keep = self.budget.needs_line_search(kl.mean) if kl.tokens else None
            if keep is None:
                break
            self._step_back(keep)
            kept *= keep
            kl = self._look()
        if self.config.line_search is not None:
            self._report(kl_step_kept=kept)
            if whole.tokens:
                self._report(kl_whole_step=whole.mean)
        if not whole.tokens:
            return
        # From the whole step, which is what the learning rate made.
        self.budget.end_step(whole.mean)
        self._warn_below_the_floor()
        self._report(kl_mean=kl.mean, kl_p99=kl.p99)

    def _warn_below_the_floor(self) -> None:
        """Warn once: nothing else would say that the rate no longer follows."""
        floor = self.budget.floor or 0.0
        if self._warned or self.budget.curvature is None or self.budget.delta >= floor:
            return
        self._warned = True
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning(BELOW_THE_FLOOR, self.budget.delta, floor, RESOLVED * floor)

    def _look(self) -> MeasuredKL:
        with self._timer.running():
            self._pass(AFTER)
            return self.probe.result()

    def _pass(self, which: str) -> None:
        selection = self._selection
        assert selection is not None

        def given(*_: Any, **__: Any) -> tuple[Any, Any]:
            return selection.micro_batches, selection.indices

        with self._engine._evaluating(), self._split_by(given), self.probe.running(which):
            self._engine.infer_batch(selection.batch, self.probe.loss_function)

    @torch.no_grad()
    def _step_back(self, keep: float) -> None:
        """Go to ``old + keep * (new - old)``.

        The optimizer's moments stay those of the whole step.
        """
        assert self._before_step is not None
        for now, old in zip(self._engine._optimised(), self._before_step, strict=True):
            now.copy_(old + keep * (now - old))
        self._engine._spread_parameters()
