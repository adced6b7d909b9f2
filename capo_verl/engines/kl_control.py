# SPDX-License-Identifier: Apache-2.0
"""One optimizer step under a KL budget, as any engine of verl drives it: look, step at a scaled
learning rate, look again.

Every rank comes to the same scale: what is measured or predicted is made known to all before it is
used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.core.kl_budget import STEPS_BACK, KLBudget
from capo_verl.engines.filter_step import FilteredStep
from capo_verl.engines.kl_probe import (
    AFTER,
    BEFORE,
    Head,
    KLProbe,
    MeasuredKL,
    everywhere,
    probe_batch,
)
from capo_verl.engines.timer import Stopwatch

logger = logging.getLogger(__name__)

AT_THE_FLOOR = (
    "the KL budget has brought the learning rate down to capo.kl_budget.scale_min=%g of yours, and "
    "a step still measures a KL of %.1e, above capo.kl_budget.delta=%g: the policy hardly trains. "
    "In half precision the rounding of activations alone may measure that much "
    "(docs/interventions.md): set delta to a few times what capo/kl_mean shows at a tiny learning "
    "rate"
)


class ProbedEngine(Protocol):
    """What the control needs of an engine."""

    optimizer: Any

    def infer_batch(self, data: TensorDict, loss_function: Any = None) -> Any: ...

    def _evaluating(self) -> AbstractContextManager[None]:
        """Within, the model is in evaluation mode; afterwards it trains, and holds no gathered
        copies of sharded weights.
        """

    def _micro_batch_groups(self) -> int:
        """The number of micro-batches has to be a multiple of this."""

    def _optimised(self) -> list[Tensor]:
        """What this rank's optimizer writes to, in an order that does not change."""

    def _spread_parameters(self) -> None:
        """Make the model follow after what :meth:`_optimised` returns was written to.

        Collective.
        """


class KLControl:
    """Holds the controller and what is known of the optimizer step in progress.

    Args:
        engine: whose optimizer it is.
        config: CAPO's knobs, with a KL budget.
        head: this rank's part of the LM head, if it holds one.
        device: where the training runs.
    """

    def __init__(
        self, engine: ProbedEngine, config: CapoConfig, head: Head | None, device: torch.device
    ):
        assert config.kl_budget is not None
        self._engine, self.config = engine, config.kl_budget
        self._tracks, self._device = config.mode == "track", device
        self.budget, self.probe = (
            KLBudget(self.config),
            KLProbe(head, self.config.estimator, device),
        )
        self._stopwatch = Stopwatch(device)
        self._first_of_rollout = True
        self._warned = False
        self._awaits = False
        """Whether the last step's KL is to come from this mini-batch's training pass."""
        self._begin()

    def _begin(self) -> None:
        self._batch: TensorDict | None = None
        self._before_step: list[Tensor] | None = None
        self._predicted: float | None = None
        self._factor: float | None = None
        self._metrics: dict[str, list[float]] = {}
        self._stopwatch.reset()

    @property
    def scale(self) -> float:
        """Of the learning rate, for what is computed before the optimizer steps."""
        return self.budget.scale

    def before(self, data: TensorDict) -> None:
        """Look at the policy before a mini-batch is trained on. On every rank.

        With k3 and ``reuse_next_forward`` the first of several mini-batches of a rollout needs no
        look: its old policy is the one of ``old_log_probs``, and the next mini-batch's own forward
            pass is one of the policy after the step.
        """
        from verl.utils import tensordict_utils as tu

        self._begin()
        first = self._first_of_rollout
        # verl moves the learning-rate schedule on after the last mini-batch of a rollout.
        last = bool(tu.get_non_tensor_data(data, key="update_lr_scheduler", default=True))
        self._first_of_rollout = last
        reuses = (
            self.config.estimator == "k3"
            and self.config.reuse_next_forward
            and self.config.line_search is None
        )
        self._defers = reuses and first and not last and data.get("old_log_probs", None) is not None
        if not self._defers:
            self._batch = probe_batch(
                data, self.config.probe_share, self._engine._micro_batch_groups()
            )
            self._look(BEFORE)

    def watch(self, loss_function: Any) -> Any:
        """The loss function of the training pass; picks up the log-probabilities if the last step's
        KL is to come from them.
        """
        if not self._awaits:
            return loss_function

        def watched(
            model_output: dict[str, Tensor], data: TensorDict, **kwargs: Any
        ) -> tuple[Tensor, dict[str, Any]]:
            self.probe.see_training(model_output, data)
            return loss_function(model_output=model_output, data=data, **kwargs)

        return watched

    def predict(self, step: FilteredStep | None, metrics: dict[str, float]) -> None:
        """Take the prediction for the coming step from the filter: the policy shift of what will be
        stepped along. Collective.

        Args:
            step: None on a rank without LM head.
            metrics: what it reports; nothing in a step that is not measured, which then has no
                bound.
        """
        if not self.config.predicts_by_curvature:
            return
        whole = self._tracks or metrics.get("capo/filter_stopped")  # the step is not filtered
        kind, when = self.config.predictor.removeprefix("fisher_"), "before" if whole else "after"
        if step is None or not metrics:
            shift = torch.tensor(math.nan, device=self._device)
        elif step.config.policy_shift == kind:
            shift = torch.tensor(
                metrics[f"capo/batch_policy_shift_{when}"], device=self._device, dtype=torch.float64
            )
        else:
            shift = getattr(step.capo.batch_shifts(policy_shift=kind), when).policy
        # It was evaluated at the scaled learning rate and is proportional to its square.
        (self._predicted,) = everywhere(
            [shift.double() / self.scale**2], step is not None and bool(metrics)
        )

    def end_awaited(self, usable: bool = True) -> None:
        """After the training pass: the last step's KL, if it was to come from it. Collective.

        Args:
            usable: False if this mini-batch is left out for NaN or infinity; then nothing was
                measured.
        """
        if self._awaits:
            self._awaits = False
            kl = self.probe.result() if usable else None
            self._learn(kl if kl and kl.tokens else None)

    @contextmanager
    def scaled(self) -> Iterator[None]:
        """Around the optimizer's step: its learning rates times this step's factor; afterwards they
        are as before, bit for bit.
        """
        groups = self._engine.optimizer.param_groups
        self._factor = self.budget.begin_step(self._predicted)
        if self.config.line_search is not None and self._batch is not None:
            self._before_step = [x.detach().clone() for x in self._engine._optimised()]
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * self._factor
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def cancel(self) -> None:
        """The optimizer did not step."""
        self.budget.cancel_step()
        self._factor = None

    def after(self) -> dict[str, list[float]]:
        """Look again, step back if needed, learn. Collective over all ranks.

        Returns:
            The metrics, the same on all ranks; a KL of the step before comes first.
        """
        if self._factor is not None:
            self._report(lr_scale=self._factor)
            if self._predicted is not None and not math.isnan(self._predicted):
                self._report(kl_predicted=self._predicted)
            if self._defers:
                self._awaits = True
            elif self._batch is not None:
                self._measure()
        self._report(kl_budget_scale=self.budget.scale, kl_probe_seconds=self._stopwatch.seconds())
        if self.budget.calibration is not None:
            self._report(kl_calibration=self.budget.calibration)
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
        # From the whole step, which is what the learning rate made.
        self._learn(whole if whole.tokens else None, reported=kl)

    def _learn(self, kl: MeasuredKL | None, reported: MeasuredKL | None = None) -> None:
        self.budget.end_step(None if kl is None else kl.mean)
        self._warn_at_the_floor(kl)
        reported = reported or kl
        if kl is not None and reported is not None:
            self._report(kl_mean=reported.mean, kl_p99=reported.p99)

    def _warn_at_the_floor(self, kl: MeasuredKL | None) -> None:
        """Once: a run at the floor hardly trains, and nothing else would say so."""
        if (
            kl is None
            or self._warned
            or self.budget.scale > self.config.scale_min
            or kl.mean <= self.config.delta
        ):
            return
        self._warned = True
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning(AT_THE_FLOOR, self.config.scale_min, kl.mean, self.config.delta)

    def _look(self, which: str) -> MeasuredKL:
        assert self._batch is not None
        with self._stopwatch.running():
            self._pass(which)
            if which == BEFORE and self.probe.settle():
                self._pass(which)
            return self.probe.result() if which == AFTER else MeasuredKL(0.0, 0.0, 0)

    def _pass(self, which: str) -> None:
        with self._engine._evaluating(), self.probe.running(which):
            self._engine.infer_batch(self._batch, self.probe.loss_function)

    @torch.no_grad()
    def _step_back(self, keep: float) -> None:
        """To ``old + keep * (new - old)``. The optimizer's moments stay those of the whole step."""
        assert self._before_step is not None
        for now, old in zip(self._engine._optimised(), self._before_step, strict=True):
            now.copy_(old + keep * (now - old))
        self._engine._spread_parameters()
