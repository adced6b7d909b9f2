# SPDX-License-Identifier: Apache-2.0
"""Predictions of CAPO about one step: m_F and m_H per token and for the batch, under each model of
the optimizer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from capo_verl.commands.calibrate.policy import Policy
from capo_verl.commands.calibrate.rollouts import Rollouts
from capo_verl.config import CapoConfig
from capo_verl.core import CapoFilter, CapoOutput
from capo_verl.core.logits import ProjectedLogits

Columns = dict[str, np.ndarray]


class Predictions:
    """CAPO's filter, asked three times: as configured, with the exact Fisher, and with the SGD
    model.

    Args:
        config: the filter that is calibrated. Its thresholds decide nothing here: it only tracks.
    """

    def __init__(self, policy: Policy, config: CapoConfig):
        weight = policy.head.weight
        vocab_size, hidden_size = weight.shape
        top_k = None if config.top_k is None or config.top_k >= vocab_size else config.top_k
        self.config = replace(
            config, mode="track", batch_shift_tokens=None, top_k=top_k, policy_shift="sampled"
        )
        self._policy = policy
        self._filter = CapoFilter(self.config, vocab_size, hidden_size, device=weight.device)
        sgd = replace(self.config, optimizer_model="sgd")
        self._sgd = CapoFilter(sgd, vocab_size, hidden_size, device=weight.device)

    def evaluate(
        self, rollouts: Rollouts, hidden: Tensor, learning_rate: float
    ) -> tuple[Columns, dict[str, float]]:
        """Predict the step along the gradients of ``rollouts``.

        Args:
            hidden: ``[N, H]``, the policy's before the step.

        Returns:
            Columns ``policy_shift, policy_shift_exact, policy_shift_sgd, objective_shift,
            in_support``, each ``[N]`` float64; and the batch's ``policy_shift, policy_shift_exact,
            objective_shift``.
        """
        exact = self._ask(
            self._filter,
            replace(self.config, policy_shift="exact"),
            rollouts,
            hidden,
            learning_rate,
        )
        self._filter.discard()  # it must not learn from the same tokens twice
        sgd = self._ask(self._sgd, self._sgd.config, rollouts, hidden, learning_rate)
        self._sgd.discard()
        own = self.learn(rollouts, hidden, learning_rate)
        objective, sampled = self._filter.batch_shifts().before
        _, expected = self._filter.batch_shifts("exact").before
        columns = {
            "policy_shift": own.policy_shift,
            "policy_shift_exact": exact.policy_shift,
            "policy_shift_sgd": sgd.policy_shift,
            "objective_shift": own.objective_shift,
            "in_support": own.in_support,
        }
        shifts = {
            "policy_shift": float(sampled),
            "policy_shift_exact": float(expected),
            "objective_shift": float(objective),
        }
        return {name: x.double().cpu().numpy() for name, x in columns.items()}, shifts

    def learn(self, rollouts: Rollouts, hidden: Tensor, learning_rate: float) -> CapoOutput:
        """Only what the moments need of a step that is not measured; then :meth:`step`."""
        return self._ask(self._filter, self.config, rollouts, hidden, learning_rate)

    def step(self) -> None:
        """The optimizer has stepped: the moments follow."""
        self._filter.step()

    def _ask(
        self,
        capo: CapoFilter,
        config: CapoConfig,
        rollouts: Rollouts,
        hidden: Tensor,
        learning_rate: float,
    ) -> CapoOutput:
        head = self._policy.head
        sequence, _ = rollouts.positions
        capo.config = config
        return capo.evaluate(
            hidden,
            ProjectedLogits(
                head.weight.detach(), None if head.bias is None else head.bias.detach()
            ),
            rollouts.actions,
            rollouts.advantages.to(hidden.dtype)[sequence],
            sequence.new_ones(len(sequence), dtype=bool),  # type: ignore[call-overload]
            learning_rate,
            sequence_ids=sequence,
            num_sequences=len(rollouts.input_ids),
        )
