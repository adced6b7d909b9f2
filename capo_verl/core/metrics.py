# SPDX-License-Identifier: Apache-2.0
"""Metrics of one optimizer step's filtering, for the loggers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.order_statistics import nearest_rank, ordered_keys
from capo_verl.core.output import CapoOutput

QUANTILES = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
SHIFTS = ("policy", "objective")
_MASSES = ("weight", "penalty", "positive_mass", "positive_kept", "negative_mass", "negative_kept")
_COUNTS = (
    "tokens",
    "rejected",
    "objective_rejected",
    "policy_rejected",
    "positive",
    "positive_rejected",
    "negative",
    "negative_rejected",
    "outside",
)


class StepMetrics:
    """Collects the outputs of the micro-batches of one optimizer step; reduces them once, over all
    ranks.

    Args:
        dp_group, cp_group: groups over which the tokens are spread.
    """

    def __init__(self, dp_group: collectives.Group = None, cp_group: collectives.Group = None):
        self._dp_group, self._cp_group = dp_group, cp_group
        self._penalised = False
        self._counts: list[Tensor] = []
        self._masses: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._shifts: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._sequences: list[Tensor] = []

    def add(
        self,
        out: CapoOutput,
        advantages: Tensor,
        response_mask: Tensor,
        sequence_ids: Tensor,
        num_sequences: int,
    ) -> None:
        """Add a micro-batch. Does not wait for the device.

        Shapes as in ``CapoFilter.evaluate``; ``advantages`` have the shape of the mask.
        """
        mask = response_mask.bool()
        alive, objective_rejected, policy_rejected = (
            mask,
            torch.zeros_like(mask),
            torch.zeros_like(mask),
        )
        for stage in out.stages:
            objective_rejected = objective_rejected | (alive & ~stage.objective_ok)
            policy_rejected = policy_rejected | (alive & ~stage.policy_ok)
            alive = alive & stage.objective_ok & stage.policy_ok
        kept = out.in_trust_region
        rejected, positive, negative = (
            mask & ~kept,
            mask & (advantages > 0),
            mask & (advantages < 0),
        )
        counted = (
            mask, rejected, objective_rejected, policy_rejected,
            positive, positive & rejected, negative, negative & rejected, mask & ~out.in_support,
        )  # fmt: skip
        counts = torch.stack(counted).flatten(1).sum(-1)
        weights, mass = out.trust_weights, advantages.abs()
        penalty = (
            torch.zeros_like(weights) if out.penalty_terms is None else out.penalty_terms.value
        )
        summed = (weights, penalty, mass, mass * weights, mass, mass * weights)
        among = (mask, mask, positive, positive, negative, negative)
        masses = [
            torch.where(of, x, 0.0).sum(dtype=torch.float64)
            for x, of in zip(summed, among, strict=True)
        ]
        shifts = torch.stack((out.policy_shift, out.objective_shift)).flatten(1)
        mask = mask.flatten()
        tokens = torch.stack((mask, out.trust_weights.flatten() > 0)).float()
        sequences = tokens.new_zeros(2, num_sequences).index_add_(1, sequence_ids.flatten(), tokens)
        # All of them, or none.
        self._penalised |= out.penalty_terms is not None
        self._counts.append(counts)
        self._masses.append(torch.stack(masses))
        self._sums.append(torch.where(mask, shifts, 0.0).sum(-1, dtype=torch.float64))
        self._shifts.append(shifts)
        self._masks.append(mask.clone())
        self._sequences.append(sequences)

    def compute(self, further: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """The metrics of the step, equal on all data- and context-parallel ranks; names are in
        docs/metrics.md. Collective.

        With no response token anywhere, shifts and rates are 0. Waits for the device once: all
        numbers come to the host in one transfer.

        Args:
            further: scalars of the caller's, by name, which join the transfer and are returned as
                they are.
        """
        further = further or {}
        groups = (self._dp_group, self._cp_group)
        sequences = collectives.sum_(torch.cat(self._sequences, dim=1), (self._cp_group,))
        emptied = ((sequences[0] > 0) & (sequences[1] == 0)).sum(dim=0, keepdim=True)
        if collectives.rank(self._cp_group) > 0:  # every context-parallel rank knows all of them
            emptied.zero_()
        columns = (
            *(torch.stack(x).sum(0) for x in (self._counts, self._masses, self._sums)),
            emptied,
        )
        totals = collectives.sum_(torch.cat([x.double() for x in columns]), groups)
        # Joined before their bits are looked at: micro-batches may differ in dtype.
        keys = ordered_keys(torch.cat(self._shifts, dim=-1), torch.cat(self._masks))
        quantiles = nearest_rank(keys, totals[0], tuple(QUANTILES.values()), groups)

        values = torch.cat(
            (
                totals,
                quantiles.flatten().double(),
                *(x.reshape(1).double() for x in further.values()),
            )
        )
        names = (
            *_COUNTS, *_MASSES, *SHIFTS, "emptied",
            *(f"{shift}_{label}" for shift in SHIFTS for label in QUANTILES), *further
        )  # fmt: skip
        total = dict(zip(names, values.tolist(), strict=True))

        def share(part: str, whole: str) -> float:
            return total[part] / total[whole] if total[whole] else 0.0

        metrics = {
            "capo/rejection_rate": share("rejected", "tokens"),
            "capo/rejection_rate_objective_test": share("objective_rejected", "tokens"),
            "capo/rejection_rate_policy_test": share("policy_rejected", "tokens"),
            "capo/rejection_rate_positive_advantage": share("positive_rejected", "positive"),
            "capo/rejection_rate_negative_advantage": share("negative_rejected", "negative"),
            "capo/weight_mean": share("weight", "tokens"),
            "capo/advantage_kept_positive": share("positive_kept", "positive_mass"),
            "capo/advantage_kept_negative": share("negative_kept", "negative_mass"),
            "capo/outside_support": share("outside", "tokens"),
            "capo/sequences_emptied": total["emptied"],
            "capo/accepted_tokens": total["tokens"] - total["rejected"],
            "capo/nothing_accepted": float(total["weight"] == 0),
        }
        if self._penalised:
            metrics["capo/penalty_mean"] = share("penalty", "tokens")
        for shift in SHIFTS:
            metrics[f"capo/{shift}_shift_mean"] = share(shift, "tokens")
            for label in QUANTILES:
                if (shift, label) != ("policy", "min"):  # m_F is never negative
                    metrics[f"capo/{shift}_shift_{label}"] = total[f"{shift}_{label}"]
        return metrics | {name: total[name] for name in further}
