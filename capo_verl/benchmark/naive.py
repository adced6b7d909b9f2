# SPDX-License-Identifier: Apache-2.0
"""CAPO as published: for all tokens of a batch at once, the four tensors ``[N, k, H]`` gradient, first moment, second moment
and preconditioned gradient, in the model's dtype (arXiv 2510.00819, sections 3 and 4; symbols as in docs/algorithm.md).

It is kinder than the published code, which holds the moments in a Python dict keyed by token id and updates them row by row:
here they are two dense tensors, temporaries are reused where possible, and the sums over tokens are one ``index_add_``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from capo_verl.config import CapoConfig
from capo_verl.core.chunks import chunk_slices
from capo_verl.core.curvature import Shifts
from capo_verl.core.trust_region import judge

_SUMMED_TOKENS = 1024


class Decision(NamedTuple):
    """``[N]`` each."""

    objective_shift: Tensor
    policy_shift: Tensor
    accepted: Tensor


class _Evaluated(NamedTuple):
    ids: Tensor
    gradient: Tensor
    accepted: Tensor


class NaiveFilter:
    """Token granularity, ``optimizer_model="adam"``, one process.

    Args:
        config: of its knobs ``top_k``, the thresholds, ``betas`` and ``eps`` are used.
        vocab_size: V.
        hidden_size: H.
        device: where the moments live.
        dtype: of the moments and of the four tensors; sums per token are at least float32.
    """

    def __init__(
        self, config: CapoConfig, vocab_size: int, hidden_size: int, *, device: torch.device | str, dtype: torch.dtype
    ):
        self.config, self.dtype = config, dtype
        self.wide = torch.promote_types(dtype, torch.float32)
        self.exp_avg = torch.zeros(vocab_size, hidden_size, device=device, dtype=dtype)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.step_count = 0
        self._evaluated: _Evaluated | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def nbytes(tokens: int, top_k: int, hidden_size: int, dtype: torch.dtype) -> int:
        """Bytes of the four tensors."""
        return 4 * tokens * top_k * hidden_size * dtype.itemsize

    @torch.no_grad()
    def evaluate(
        self,
        hidden_states: Tensor,
        logits: Tensor,
        actions: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        learning_rate: float,
    ) -> Decision:
        """As ``CapoFilter.evaluate``, for ``[N, ...]``."""
        hidden = hidden_states.to(self.dtype)
        values, ids = logits.topk(self.config.top_k or logits.shape[-1])
        pi = values.to(self.wide).softmax(-1)
        taken = ids == actions[:, None]
        v = taken.to(self.wide) - pi
        advantages = advantages.to(self.wide)

        coefficient = (advantages[:, None] * v).to(self.dtype)
        gradient = coefficient[..., None] * hidden[:, None]  # [N, k, H]
        direction = self._precondition(ids, gradient)
        u = torch.matmul(direction, hidden[..., None])[..., 0].to(self.wide)
        del direction

        d, mean, mean_square = (v * u).sum(-1), (pi * u).sum(-1), (pi * u * u).sum(-1)
        half = 0.5 * learning_rate**2
        curvature = d**2 - (mean_square - mean**2)
        objective = learning_rate * advantages * d + half * advantages * curvature
        policy = half * d**2
        accepted = response_mask.bool() & judge(self.config, Shifts(objective, policy)).accepted
        self._evaluated = _Evaluated(ids, gradient, accepted)
        return Decision(objective, policy, accepted)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Sum the accepted gradients of :meth:`evaluate` per row."""
        if self._evaluated is None:
            raise RuntimeError("accumulate() before evaluate()")
        ids, gradient, accepted = self._evaluated
        self._evaluated = None
        sums = torch.zeros(self.exp_avg.shape, device=gradient.device, dtype=self.wide)
        counts = torch.zeros(len(sums), device=gradient.device, dtype=self.wide)
        for part in chunk_slices(len(ids), _SUMMED_TOKENS):
            weight = accepted[part].to(self.wide)
            rows = ids[part].flatten()
            sums.index_add_(0, rows, (gradient[part] * weight[:, None, None]).flatten(0, 1))
            counts.index_add_(0, rows, weight.repeat_interleave(ids.shape[1]))
        self._sums = (sums, counts)

    @torch.no_grad()
    def update(self) -> None:
        """Move the moments of the touched rows by their mean accepted gradient."""
        if self._sums is None:
            raise RuntimeError("update() before accumulate()")
        sums, counts = self._sums
        self._sums = None
        rows = counts.nonzero()[:, 0]
        if not len(rows):
            return
        mean = sums[rows].div_(counts[rows, None])
        beta1, beta2 = self.config.betas
        first = self.exp_avg[rows].to(self.wide).mul_(beta1).add_(mean, alpha=1 - beta1)
        second = self.exp_avg_sq[rows].to(self.wide).mul_(beta2).addcmul_(mean, mean, value=1 - beta2)
        self.exp_avg[rows], self.exp_avg_sq[rows] = first.to(self.dtype), second.to(self.dtype)
        self.step_count += 1

    def state_dict(self) -> dict[str, Any]:
        """As ``CapoFilter.state_dict``."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As ``CapoFilter.load_state_dict``, unchecked."""
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])
        self.step_count = state["step"]

    def _precondition(self, ids: Tensor, gradient: Tensor) -> Tensor:
        if self.step_count == 0:
            return gradient
        (beta1, beta2), n = self.config.betas, self.step_count + 1
        first = self.exp_avg[ids].mul_(beta1).add_(gradient, alpha=1 - beta1).div_(1 - beta1**n)
        second = self.exp_avg_sq[ids].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).div_(1 - beta2**n)
        return first / second.sqrt_().add_(self.config.eps)
