# SPDX-License-Identifier: Apache-2.0
"""One optimizer step under CAPO, on any engine: evaluate, mask the loss, report, update moments."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.core import CapoFilter, ProjectedLogits
from capo_verl.core.metrics import StepMetrics
from capo_verl.core.penalty import PenaltyTerms
from capo_verl.engines.lm_head import HiddenStatesTap
from capo_verl.engines.nonfinite import NonFinite
from capo_verl.engines.response import (
    SAMPLE,
    PackedResponse,
    accepted_response,
    mask_rejected,
    weigh_advantages,
)
from capo_verl.engines.timer import Timer
from capo_verl.engines.token_samples import TokenSamples

logger = logging.getLogger(__name__)

STEPS_WITHOUT_TOKENS = 3
"""After so many optimizer steps without an accepted token a warning says so: the run does not get
out of this by itself.
"""

ACCEPTED = "capo_accepted"
"""Key of the tokens' weights in the engine's model output."""
PENALTY = "capo_penalty"
"""Key of the tokens' penalties, part of the graph; only there if the config asks for a penalty."""

LossFunction = Callable[..., tuple[Tensor, dict[str, Any]]]


class FilterStep:
    """Holds the filter and what accumulates between two optimizer steps.

    Args:
        capo: the filter.
        config: its knobs.
        device: where the training runs, for the timer.
        nonfinite: where NaN, infinity and the decisions are noted.
        tap: picks up the hidden states of the micro-batch in flight.
    """

    def __init__(
        self,
        capo: CapoFilter,
        config: CapoConfig,
        device: torch.device,
        nonfinite: NonFinite,
        tap: HiddenStatesTap,
    ):
        self.capo, self.config, self._nonfinite, self.tap = capo, config, nonfinite, tap
        self._timer = Timer(device)
        self.samples = TokenSamples(config, capo)
        self._steps_without_tokens = 0
        self._told_of_stop = False
        self._penalty_terms: PenaltyTerms | None = None
        self.discard()

    def begin(self, step: int) -> None:
        """Begin an optimizer step, before its first micro-batch.

        Args:
            step: the engine's count of training steps.
        """
        self.capo.keep_for_batch_shifts = self.config.takes_batch_shifts(step)
        self.samples.begin(step)

    def discard(self) -> None:
        """Gradients were zeroed: forget what was evaluated since the last optimizer step."""
        self.capo.discard()
        self._metrics = StepMetrics(self.capo.dp_group, self.capo.cp_group)
        self._timer.reset()
        self.samples.discard()

    @torch.no_grad()
    def evaluate(
        self,
        hidden_states: Tensor,
        logits: Tensor | ProjectedLogits,
        labels: Tensor,
        temperature: Tensor,
        response: PackedResponse,
        learning_rate: float,
    ) -> Tensor:
        """Decide about one micro-batch.

        Args:
            hidden_states: ``[b, s, H]``; logits: ``[b, s, rows]`` before temperature, or the LM
                head; labels: ``[b, s]``; temperature: ``[b, s]``; response: in the same layout.
            learning_rate: of the coming optimizer step.

        Returns:
            ``[b, s]`` float32, the factor of each token's loss: 0 or 1, or in between with soft
            weights.
        """
        with self._timer.running():
            out = self.capo.evaluate(
                hidden_states, logits, labels, response.advantages, response.response_mask,
                learning_rate, temperature=temperature, skip_masked=True,
                sequence_ids=response.sequence_ids, num_sequences=response.num_sequences,
                # On a CPU the tokens can be counted.
                max_tokens=None if labels.device.type == "cpu" else response.max_tokens,
                check_values=False,
            )  # fmt: skip
            self._nonfinite.note_tokens(out.problems, response.samples[response.sequence_ids])
            self._metrics.add(
                out,
                response.advantages,
                response.response_mask,
                response.sequence_ids,
                response.num_sequences,
            )
            weights = out.weights.float()
            self._nonfinite.note_decisions(weights)
        self.samples.keep(out)
        self._penalty_terms = out.penalty_terms
        return weights

    def take_penalty_terms(self) -> PenaltyTerms | None:
        """Hand on the terms of the micro-batch just evaluated, for ``curvature_penalty``.

        None unless the config asks for a penalty.
        """
        terms, self._penalty_terms = self._penalty_terms, None
        return terms

    def wrap_loss(self, loss_function: LossFunction) -> LossFunction:
        """The chosen loss on the accepted tokens, or on weighted advantages, plus the penalty.

        verl's own metrics keep describing all response tokens: they come from a second evaluation
        of the loss, on the per-token log-probabilities, which is cheap. The loss itself is reported
        as it is optimised.

        Args:
            loss_function: as verl's worker binds it, with its actor config as keyword ``config``.
        """
        actor_config = getattr(loss_function, "keywords", {}).get("config")
        weigh = mask_rejected if self.config.weighting == "hard" else weigh_advantages

        def filtered(
            model_output: dict[str, Tensor], data: TensorDict, **kwargs: Any
        ) -> tuple[Tensor, dict[str, Any]]:
            weights, penalty = model_output.pop(ACCEPTED), model_output.pop(PENALTY, None)
            self.samples.add(model_output.get("log_probs"), data)
            if self.config.mode == "track":
                loss, metrics = loss_function(model_output=model_output, data=data, **kwargs)
                self._nonfinite.note_loss(loss, data, data[SAMPLE])
                return loss, metrics
            kept = weigh(data, accepted_response(weights, data))
            with torch.no_grad():
                _, metrics = loss_function(model_output=model_output, data=data, **kwargs)
            loss, of_accepted = loss_function(model_output=model_output, data=kept, **kwargs)
            metrics["actor/pg_loss"] = of_accepted["actor/pg_loss"]
            if penalty is not None:
                loss = loss + aggregated_penalty(
                    accepted_response(penalty, data), kept, actor_config
                )
            self._nonfinite.note_loss(loss, data, data[SAMPLE])
            return loss, metrics

        return filtered

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The metrics of the micro-batches since the last optimizer step.

        Called before that step, on every rank. Waits for the device once.
        """
        diagnostics: dict[str, Tensor] = {}
        if self.capo.keep_for_batch_shifts:
            with self._timer.running():
                batch_shifts = self.capo.batch_shifts()
            for when, shifts in zip(("before", "after"), batch_shifts, strict=True):
                diagnostics[f"capo/batch_objective_shift_{when}"] = shifts.objective
                diagnostics[f"capo/batch_policy_shift_{when}"] = shifts.policy
            diagnostics["capo/batch_shift_coverage"] = self.capo.batch_shift_coverage
        metrics = self._metrics.compute(diagnostics | self.capo.adaptive_metrics())
        if not math.isfinite(metrics.get("capo/policy_threshold", 0.0)):
            del metrics["capo/policy_threshold"]  # not known yet
        self._warn_if_stuck(metrics)
        self._warn_if_stopped(metrics)
        return metrics

    def _warn_if_stuck(self, metrics: dict[str, float]) -> None:
        filters = self.config.mode == "filter" and not metrics.get("capo/filter_stopped")
        stuck = filters and metrics["capo/nothing_accepted"]
        self._steps_without_tokens = self._steps_without_tokens + 1 if stuck else 0
        if self._steps_without_tokens == STEPS_WITHOUT_TOKENS:
            logger.warning(
                "CAPO accepted no token in %d optimizer steps in a row: neither the policy nor the "
                "moments move. Half of the tokens have m_F < %.1e and m_H < %.1e; raise "
                "capo.policy_shift_max or capo.objective_shift_max",
                STEPS_WITHOUT_TOKENS, metrics["capo/policy_shift_p50"],
                metrics["capo/objective_shift_p50"],
            )  # fmt: skip

    def _warn_if_stopped(self, metrics: dict[str, float]) -> None:
        if (
            metrics.get("capo/filter_stopped")
            and self.config.mode == "filter"
            and not self._told_of_stop
        ):
            self._told_of_stop = True
            logger.warning(
                "CAPO rejected more than %g of the tokens in %d optimizer steps in a row and "
                "filters no more (capo.max_rejection): from now on it only measures (penalties "
                "stay). Half of the tokens have m_F < %.1e; raise capo.policy_shift_max, or use "
                "+capo=kl_budget",
                self.config.max_rejection, self.config.max_rejection_steps,
                metrics["capo/policy_shift_p50"],
            )  # fmt: skip

    def optimizer_step(self) -> float:
        """Update the moments.

        Returns the seconds spent in the filter for this step, without the reduction of the metrics.
        """
        with self._timer.running():
            self.capo.step()
        self.samples.write()
        return self.seconds()

    def seconds(self) -> float:
        """Spent in the filter since the last optimizer step. Waits for the device."""
        return self._timer.seconds()


def aggregated_penalty(penalty: Tensor, kept: TensorDict, actor_config: Any) -> Tensor:
    """Mean penalty of the kept tokens, aggregated as verl's ``ppo_loss`` aggregates the policy
    loss.

    Args:
        penalty: of the responses, nested or padded like ``response_mask``; part of a graph.
        kept: the micro-batch whose response mask holds the tokens that are kept.
        actor_config: verl's actor config: ``loss_agg_mode``, ``loss_scale_factor``.

    Returns:
        Scalar, to be added to the loss.

    Raises:
        ValueError: without the config.
    """
    # Here and not above: loading verl's trainer loads our plugin, which imports this module.
    from verl.trainer.ppo.core_algos import agg_loss

    if actor_config is None:
        raise ValueError(
            "a penalty (capo.policy_penalty, capo.objective_penalty) needs verl's actor config to "
            "be aggregated"
        )
    mask = kept.select("response_mask").to_padded_tensor()["response_mask"].to(bool)
    if penalty.is_nested:
        penalty = torch.nested.to_padded_tensor(penalty, 0.0, output_size=mask.shape)
    sizes = {name: kept[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    return agg_loss(
        loss_mat=penalty,
        loss_mask=mask,
        loss_agg_mode=actor_config.loss_agg_mode,
        loss_scale_factor=actor_config.loss_scale_factor,
        **sizes,
    )
