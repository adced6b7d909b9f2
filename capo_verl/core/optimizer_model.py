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
from capo_verl.core.rounding import round_to_bfloat16
from capo_verl.core.row_sums import RowSums
from capo_verl.core.segments import segment_sums
from capo_verl.core.support import Pairs, VocabShard


class SgdModel:
    """``P(g) = g``. Nothing to remember."""

    is_identity = True
    step_count = 0
    dtype = torch.float32

    def promote(self, dtype: torch.dtype) -> None:
        self.dtype = torch.promote_types(self.dtype, dtype)

    def move(self, device: torch.device) -> None:
        pass

    def count_tokens(self, accepted: Tensor) -> None:
        pass

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

    Args:
        moments_dtype: in which the moments are stored; the arithmetic is float32.

    Attributes:
        exp_avg, exp_avg_sq: ``[rows, H]``, M and Q; float64 once float64 inputs were seen, unless stored in bfloat16.
        step_count: n, the number of updates so far. Before the first, P(g) = g as in the authors' implementation.
        dtype: of the arithmetic.
    """

    def __init__(
        self,
        shard: VocabShard,
        hidden_size: int,
        betas: tuple[float, float],
        eps: float,
        device: torch.device,
        moments_dtype: torch.dtype = torch.float32,
    ):
        self.shard, self.betas, self.eps = shard, betas, eps
        shape = (shard.rows, hidden_size)
        self.exp_avg = torch.zeros(shape, device=device, dtype=moments_dtype)
        self.exp_avg_sq = torch.zeros(shape, device=device, dtype=moments_dtype)
        self.step_count = 0
        self.dtype = torch.float32
        self._accepted = RowSums(shard.rows, hidden_size, device, self.dtype)

    @property
    def is_identity(self) -> bool:
        return self.step_count == 0

    def promote(self, dtype: torch.dtype) -> None:
        """Widen the arithmetic if ``dtype`` is wider: float64 inputs are evaluated in float64."""
        if torch.promote_types(self.dtype, dtype) != self.dtype:
            self.dtype = dtype
            self._accepted.move(dtype=dtype)
            if self.exp_avg.dtype != torch.bfloat16:
                self.exp_avg, self.exp_avg_sq = self.exp_avg.to(dtype), self.exp_avg_sq.to(dtype)

    def move(self, device: torch.device) -> None:
        """Move everything to ``device``."""
        self.exp_avg, self.exp_avg_sq = self.exp_avg.to(device), self.exp_avg_sq.to(device)
        self._accepted.move(device)

    def precondition(self, rows: Tensor, gradient: Tensor, columns: slice) -> Tensor:
        """``P(g)`` elementwise, with the moments after this gradient.

        Args:
            rows: ``[P]`` int64, row of each gradient.
            gradient: ``[P, c]``, its columns ``columns`` of H.
        """
        if self.is_identity:
            return gradient
        (beta1, beta2), n = self.betas, self.step_count + 1
        first = self.exp_avg[rows, columns].to(gradient.dtype).mul_(beta1 / (1 - beta1**n))
        first.add_(gradient, alpha=(1 - beta1) / (1 - beta1**n))
        second = self.exp_avg_sq[rows, columns].to(gradient.dtype).mul_(beta2 / (1 - beta2**n))
        second.addcmul_(gradient, gradient, value=(1 - beta2) / (1 - beta2**n))
        return first.div_(second.sqrt_().add_(self.eps))

    def count_tokens(self, accepted: Tensor) -> None:
        """Note how many tokens were accepted (scalar int64): without any the moments do not move."""
        self._accepted.count_tokens(accepted)

    def accumulate(self, hidden: Tensor, advantages: Tensor, pairs: Pairs) -> None:
        """Add ``g`` of the given entries to their rows' sums.

        Args:
            hidden: ``[N, H]``; advantages: ``[N]``; pairs: entries of accepted tokens only.
        """
        self._accepted.count_entries(pairs.row)
        weight = advantages[pairs.token] * pairs.v
        for rows, total in segment_sums(
            hidden[pairs.tokens].to(self.dtype), pairs.token - pairs.tokens.start, pairs.row, weight
        ):
            self._accepted.add(rows, total)

    def discard(self) -> None:
        """Forget what was accumulated since the last update."""
        self._accepted.clear()

    def update(self, groups: Sequence[collectives.Group]) -> None:
        """Move the moments by the mean accepted gradient of the mini-batch; rows without one keep their values.

        Without any accepted token nothing changes, the number of updates neither.

        Args:
            groups: data- and context-parallel groups over which the accepted tokens are spread.
        """
        accepted, means = self._accepted.reduce(groups)
        beta1, beta2 = self.betas
        for rows, mean in means:
            for part in chunk_slices(len(rows), max(1, scratch_elements(mean.device) // max(1, mean.shape[1]))):
                at, g = rows[part], mean[part]
                first = self.exp_avg[at].to(g.dtype).mul_(beta1).add_(g, alpha=1 - beta1)
                second = self.exp_avg_sq[at].to(g.dtype).mul_(beta2).addcmul_(g, g, value=1 - beta2)
                self.exp_avg[at] = self._stored(first, at, salt=0)
                self.exp_avg_sq[at] = self._stored(second, at, salt=1)
        self.step_count += int(accepted > 0)
        self.discard()

    def _stored(self, x: Tensor, rows: Tensor, salt: int) -> Tensor:
        if self.exp_avg.dtype != torch.bfloat16:
            return x
        return round_to_bfloat16(x, rows + self.shard.start, self.step_count, salt)

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
        for name in ("exp_avg", "exp_avg_sq"):
            value, shape = state[name], self.exp_avg.shape
            if value.shape != shape:
                raise ValueError(f"CAPO state: {name} has shape {tuple(value.shape)}, this rank needs {tuple(shape)}")
            if not value.isfinite().all():
                raise ValueError(f"CAPO state: {name} holds non-finite values; the checkpoint is corrupt")
        if (state["exp_avg_sq"] < 0).any():
            raise ValueError("CAPO state: exp_avg_sq holds negative values; the checkpoint is corrupt")
        self.promote(torch.promote_types(state["exp_avg"].dtype, torch.float32))
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])
        self.step_count = step
        self.discard()


OptimizerModel = AdamModel | SgdModel
