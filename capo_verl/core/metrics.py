# SPDX-License-Identifier: Apache-2.0
"""What one optimizer step's filtering looked like, as numbers for the loggers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.filter import CapoOutput

QUANTILES = {"p01": 0.01, "p50": 0.5, "p90": 0.9, "p99": 0.99}


class _Tokens(NamedTuple):
    objective_shift: Tensor
    policy_shift: Tensor
    advantages: Tensor
    kept: Tensor
    objective_rejected: Tensor
    policy_rejected: Tensor
    in_support: Tensor


class StepMetrics:
    """Collects the outputs of the micro-batches of one optimizer step; reduces them once, over all ranks.

    Args:
        dp_group, cp_group: groups over which the tokens are spread.
    """

    def __init__(self, dp_group: collectives.Group = None, cp_group: collectives.Group = None):
        self._dp_group, self._cp_group = dp_group, cp_group
        self._tokens: list[_Tokens] = []
        self._sequences: list[Tensor] = []

    def add(
        self, out: CapoOutput, advantages: Tensor, response_mask: Tensor, sequence_ids: Tensor, num_sequences: int
    ) -> None:
        """One micro-batch. Shapes as in ``CapoFilter.evaluate``; ``advantages`` have the shape of the mask."""
        mask = response_mask.bool()
        alive, objective_rejected, policy_rejected = mask, torch.zeros_like(mask), torch.zeros_like(mask)
        for stage in out.stages:
            objective_rejected = objective_rejected | (alive & ~stage.objective_ok)
            policy_rejected = policy_rejected | (alive & ~stage.policy_ok)
            alive = alive & stage.objective_ok & stage.policy_ok
        columns = (
            out.objective_shift, out.policy_shift, advantages, out.in_trust_region, objective_rejected, policy_rejected,
            out.in_support,
        )  # fmt: skip
        self._tokens.append(_Tokens(*(x[mask] for x in columns)))
        counts = torch.zeros(2, num_sequences, device=mask.device)
        for row, which in zip(counts, (mask, out.in_trust_region), strict=True):
            row.index_add_(0, sequence_ids.flatten(), which.flatten().to(row.dtype))
        self._sequences.append(counts)

    def compute(self) -> dict[str, float]:
        """The metrics of the step, equal on all data- and context-parallel ranks; names are in docs/metrics.md.

        With no response token anywhere, shifts and rates are 0.
        """
        groups = (self._dp_group, self._cp_group)
        t = _Tokens(*(torch.cat(columns) for columns in zip(*self._tokens, strict=True)))
        rejected, positive, negative = ~t.kept, t.advantages > 0, t.advantages < 0
        sums = {
            "tokens": torch.ones_like(t.kept),
            "rejected": rejected,
            "objective_rejected": t.objective_rejected,
            "policy_rejected": t.policy_rejected,
            "positive": positive,
            "positive_rejected": positive & rejected,
            "negative": negative,
            "negative_rejected": negative & rejected,
            "outside": ~t.in_support,
            "policy": t.policy_shift,
            "objective": t.objective_shift,
        }
        totals = collectives.sum_(torch.stack([x.double().sum() for x in sums.values()]), groups)
        total = dict(zip(sums, totals.tolist(), strict=True))
        sequences = collectives.sum_(torch.cat(self._sequences, dim=1), (self._cp_group,))
        emptied = collectives.sum_(((sequences[0] > 0) & (sequences[1] == 0)).sum(), (self._dp_group,)).item()

        def share(part: str, whole: str) -> float:
            return total[part] / total[whole] if total[whole] else 0.0

        metrics = {
            "capo/rejection_rate": share("rejected", "tokens"),
            "capo/rejection_rate_objective_test": share("objective_rejected", "tokens"),
            "capo/rejection_rate_policy_test": share("policy_rejected", "tokens"),
            "capo/rejection_rate_positive_advantage": share("positive_rejected", "positive"),
            "capo/rejection_rate_negative_advantage": share("negative_rejected", "negative"),
            "capo/outside_support": share("outside", "tokens"),
            "capo/sequences_emptied": float(emptied),
            "capo/accepted_tokens": total["tokens"] - total["rejected"],
            "capo/nothing_accepted": float(total["tokens"] == total["rejected"]),
        }
        for name, values in (("policy", t.policy_shift), ("objective", t.objective_shift)):
            ordered = self._gather(values).sort().values
            prefix = f"capo/{name}_shift"
            metrics[f"{prefix}_mean"] = share(name, "tokens")
            metrics[f"{prefix}_max"] = _at(ordered, 1.0)
            if name == "objective":  # m_F is never negative
                metrics[f"{prefix}_min"] = _at(ordered, 0.0)
            for label, q in QUANTILES.items():
                metrics[f"{prefix}_{label}"] = _at(ordered, q)
        return metrics

    def _gather(self, values: Tensor) -> Tensor:
        """All ranks' values. Ranks hold different numbers of tokens; NaN fills up and is taken out again."""
        for group in (self._dp_group, self._cp_group):
            if collectives.size(group) > 1:
                longest = int(collectives.max_(torch.tensor(len(values), device=values.device), (group,)))
                padded = torch.nn.functional.pad(values, (0, longest - len(values)), value=torch.nan)
                gathered = collectives.gather(padded, group)
                values = gathered[~gathered.isnan()]
        return values


def _at(ordered: Tensor, q: float) -> float:
    """The q-quantile of sorted values: the value at the nearest rank."""
    return float(ordered[round(q * (len(ordered) - 1))]) if len(ordered) else 0.0
