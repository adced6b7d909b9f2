# SPDX-License-Identifier: Apache-2.0
"""What the optimizer will make of a gradient of the LM head: ``P(g)``, per unit learning rate.

``sgd``: ``P(g) = g``. ``adam``: row-wise first and second moments of the mean accepted gradient, kept beside the real
optimizer's. All tensors hold this rank's vocabulary rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.chunks import chunk_slices, scratch_elements
from capo_verl.core.segments import segment_sums
from capo_verl.core.support import Pairs, VocabShard


class SgdModel:
    """``P(g) = g``. Nothing to remember."""

    is_identity = True
    step_count = 0
    dtype = torch.float32

    def promote(self, dtype: torch.dtype) -> None:
        self.dtype = torch.promote_types(self.dtype, dtype)

    def accumulate(self, hidden: Tensor, advantages: Tensor, pairs: Pairs) -> None:
        pass

    def discard(self) -> None:
        pass

    def update(self, groups: Sequence[collectives.Group]) -> None:
        pass

    def precondition(self, rows: Tensor, gradient: Tensor, columns: slice) -> Tensor:
        return gradient

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"optimizer_model='sgd' has no state, but the checkpoint holds {sorted(state)}")


class AdamModel:
    """Row-wise Adam moments of the LM head's policy gradient.

    Attributes:
        exp_avg, exp_avg_sq: ``[rows, H]``, M and Q; float32, or float64 once float64 inputs were seen.
        step_count: n, the number of updates so far. Before the first, P(g) = g as in the authors' implementation.
    """

    def __init__(
        self, shard: VocabShard, hidden_size: int, betas: tuple[float, float], eps: float, device: torch.device
    ):
        self.shard, self.betas, self.eps = shard, betas, eps
        shape = (shard.rows, hidden_size)
        self.exp_avg = torch.zeros(shape, device=device)
        self.exp_avg_sq = torch.zeros(shape, device=device)
        self.step_count = 0
        self._grad_sum = torch.zeros(shape, device=device)
        self._grad_count = torch.zeros(shard.rows, device=device)

    @property
    def dtype(self) -> torch.dtype:
        return self.exp_avg.dtype

    @property
    def is_identity(self) -> bool:
        return self.step_count == 0

    def promote(self, dtype: torch.dtype) -> None:
        """Widen the moments if ``dtype`` is wider than theirs: float64 inputs are evaluated in float64."""
        if torch.promote_types(self.dtype, dtype) != self.dtype:
            self.exp_avg, self.exp_avg_sq = self.exp_avg.to(dtype), self.exp_avg_sq.to(dtype)
            self._grad_sum, self._grad_count = self._grad_sum.to(dtype), self._grad_count.to(dtype)

    def precondition(self, rows: Tensor, gradient: Tensor, columns: slice) -> Tensor:
        """``P(g)`` elementwise, with the moments after this gradient.

        Args:
            rows: ``[P]`` int64, row of each gradient.
            gradient: ``[P, c]``, its columns ``columns`` of H.
        """
        if self.is_identity:
            return gradient
        (beta1, beta2), n = self.betas, self.step_count + 1
        first = (
            self.exp_avg[rows, columns].mul_(beta1 / (1 - beta1**n)).add_(gradient, alpha=(1 - beta1) / (1 - beta1**n))
        )
        second = self.exp_avg_sq[rows, columns].mul_(beta2 / (1 - beta2**n))
        second.addcmul_(gradient, gradient, value=(1 - beta2) / (1 - beta2**n))
        return first.div_(second.sqrt_().add_(self.eps))

    def accumulate(self, hidden: Tensor, advantages: Tensor, pairs: Pairs) -> None:
        """Add ``g`` of the given entries to their rows' sums.

        Args:
            hidden: ``[N, H]``; advantages: ``[N]``; pairs: entries of accepted tokens only.
        """
        weight = advantages[pairs.token] * pairs.v
        for rows, total in segment_sums(
            hidden[pairs.tokens].to(self.dtype), pairs.token - pairs.tokens.start, pairs.row, weight
        ):
            self._grad_sum[rows] += total
        self._grad_count += torch.bincount(pairs.row, minlength=self.shard.rows)

    def discard(self) -> None:
        """Forget what was accumulated since the last update."""
        self._grad_sum.zero_()
        self._grad_count.zero_()

    def update(self, groups: Sequence[collectives.Group]) -> None:
        """Move the moments by the mean accepted gradient of the mini-batch; rows without one keep their values.

        Args:
            groups: data- and context-parallel groups over which the accepted tokens are spread.
        """
        count = collectives.sum_(self._grad_count.clone(), groups)
        rows = count.nonzero()[:, 0]
        beta1, beta2 = self.betas
        for part in chunk_slices(len(rows), max(1, scratch_elements(count.device) // max(1, self.exp_avg.shape[1]))):
            touched = rows[part]
            mean = collectives.sum_(self._grad_sum[touched], groups).div_(count[touched, None])
            self.exp_avg[touched] = self.exp_avg[touched].mul_(beta1).add_(mean, alpha=1 - beta1)
            self.exp_avg_sq[touched] = self.exp_avg_sq[touched].mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
        self.step_count += 1
        self.discard()

    def state_dict(self) -> dict[str, Any]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved moments.

        Raises:
            ValueError: for missing or unexpected keys, other shapes, non-finite values or a negative step.
        """
        expected = {"exp_avg", "exp_avg_sq", "step"}
        if set(state) != expected:
            raise ValueError(f"CAPO state holds {sorted(state)}, expected {sorted(expected)}")
        step = int(state["step"])
        if step < 0:
            raise ValueError(f"CAPO state: step={step} is negative")
        loaded = {}
        for name in ("exp_avg", "exp_avg_sq"):
            value, shape = state[name], self.exp_avg.shape
            if value.shape != shape:
                raise ValueError(f"CAPO state: {name} has shape {tuple(value.shape)}, this rank needs {tuple(shape)}")
            if not value.isfinite().all():
                raise ValueError(f"CAPO state: {name} holds non-finite values; the checkpoint is corrupt")
            loaded[name] = value.to(device=self.exp_avg.device)
        if (loaded["exp_avg_sq"] < 0).any():
            raise ValueError("CAPO state: exp_avg_sq holds negative values; the checkpoint is corrupt")
        self.promote(torch.promote_types(loaded["exp_avg"].dtype, torch.float32))
        self.exp_avg.copy_(loaded["exp_avg"])
        self.exp_avg_sq.copy_(loaded["exp_avg_sq"])
        self.step_count = step
        self.discard()


OptimizerModel = AdamModel | SgdModel
