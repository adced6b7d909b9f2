# SPDX-License-Identifier: Apache-2.0
"""CAPO as published: for all tokens at once, tensors ``[N, k, H]`` in the model's dtype.

They are the gradient, both moments of its rows and the preconditioned gradient (arXiv 2510.00819,
sections 3 and 4; symbols as in docs/algorithm.md).

It is kinder than the published code, which holds the moments in a Python dict keyed by token id and
updates them row by row: here they are two dense tensors, and the sums over tokens are one
``index_add_``.

Twice: every formula one expression, as it is written; and the same with its temporaries reused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from capo_verl.config import CapoConfig, TargetRejection
from capo_verl.core.chunks import chunk_slices
from capo_verl.core.curvature import Shifts
from capo_verl.core.trust_region import fixed_policy_shift_max, judge

BATCH_TOKENS = 24 * 1024
"""Tokens that the authors evaluate at once: 24 sequences of 1,024."""
_SUMMED_TOKENS = 1024
_TENSORS_ALIVE = {False: 7, True: 4}
"""``reuse_temporaries`` -> the most tensors ``[N, k, H]`` at any time.

Without: g, M, Q, the new first moment, and of the second both terms and their sum. With: g, both
moments, P(g). tests/experiments/benchmark/test_memory.py counts them.
"""


class Decision(NamedTuple):
    """Shifts (float) and accepted tokens (bool), ``[N]`` each."""

    objective_shift: Tensor
    policy_shift: Tensor
    accepted: Tensor


class _Evaluated(NamedTuple):
    ids: Tensor
    gradient: Tensor
    accepted: Tensor


class NaiveFilter:
    """Token granularity, ``optimizer_model="adam"``, one process.

    Call :meth:`evaluate` and :meth:`accumulate` for every batch of at most ``BATCH_TOKENS`` tokens,
    then :meth:`update` once.

    Args:
        config: of its knobs ``top_k``, the thresholds, ``betas`` and ``eps`` are used.
        vocab_size: V.
        hidden_size: H.
        device: where the moments live.
        dtype: of the moments and of the tensors ``[N, k, H]``; sums per token are at least float32.
        reuse_temporaries: write over tensors that are no longer needed, and form no product that is
            only summed.

    Raises:
        ValueError: for a threshold that sets itself, which the paper does not have.
    """

    def __init__(
        self,
        config: CapoConfig,
        vocab_size: int,
        hidden_size: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        reuse_temporaries: bool = False,
    ):
        if isinstance(config.policy_shift_max, TargetRejection):
            raise ValueError(
                f"policy_shift_max={config.policy_shift_max}: the published CAPO has a fixed "
                "tau_F; set a number"
            )
        self.config, self.dtype, self.reuse_temporaries = config, dtype, reuse_temporaries
        self.wide = torch.promote_types(dtype, torch.float32)
        self.exp_avg = torch.zeros(vocab_size, hidden_size, device=device, dtype=dtype)
        self.exp_avg_sq = torch.zeros_like(self.exp_avg)
        self.step_count = 0
        self._evaluated: _Evaluated | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def nbytes(
        tokens: int, top_k: int, hidden_size: int, dtype: torch.dtype, reuse_temporaries: bool
    ) -> int:
        """The most bytes of tensors ``[N, k, H]`` at any time, of at most one batch of tokens."""
        return (
            _TENSORS_ALIVE[reuse_temporaries]
            * min(tokens, BATCH_TOKENS)
            * top_k
            * hidden_size
            * dtype.itemsize
        )

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
        """Evaluate one batch ``[N, ...]``, as ``CapoFilter.evaluate``."""
        hidden = hidden_states.to(self.dtype)
        values, ids = logits.topk(self.config.top_k or logits.shape[-1])
        pi = values.to(self.wide).softmax(-1)
        taken = ids == actions[:, None]
        v = taken.to(self.wide) - pi
        advantages = advantages.to(self.wide)

        coefficient = (advantages[:, None] * v).to(self.dtype)
        g = coefficient[..., None] * hidden[:, None]  # [N, k, H]
        u = self._project(self._precondition(ids, g), hidden).to(self.wide)

        d, mean, mean_square = (v * u).sum(-1), (pi * u).sum(-1), (pi * u * u).sum(-1)
        half = 0.5 * learning_rate**2
        curvature = d**2 - (mean_square - mean**2)
        objective = learning_rate * advantages * d + half * advantages * curvature
        policy = half * d**2
        tau = fixed_policy_shift_max(self.config, learning_rate)
        verdict = judge(self.config, Shifts(objective, policy), tau, learning_rate)
        accepted = response_mask.bool() & verdict.accepted
        self._evaluated = _Evaluated(ids, g, accepted)
        return Decision(objective, policy, accepted)

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the accepted gradients of the last :meth:`evaluate` to the sums per row."""
        if self._evaluated is None:
            raise RuntimeError("accumulate() before evaluate()")
        ids, gradient, accepted = self._evaluated
        self._evaluated = None
        if self._sums is None:
            sums = torch.zeros(self.exp_avg.shape, device=gradient.device, dtype=self.wide)
            self._sums = sums, sums.new_zeros(len(sums))
        sums, counts = self._sums
        for part in chunk_slices(
            len(ids), _SUMMED_TOKENS if self.reuse_temporaries else BATCH_TOKENS
        ):
            weight = accepted[part].to(self.wide)
            rows = ids[part].flatten()
            sums.index_add_(0, rows, (gradient[part] * weight[:, None, None]).flatten(0, 1))
            counts.index_add_(0, rows, weight.repeat_interleave(ids.shape[1]))

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
        mean = (
            sums[rows].div_(counts[rows, None])
            if self.reuse_temporaries
            else sums[rows] / counts[rows, None]
        )
        m, v = self._move(
            self.exp_avg[rows].to(self.wide), self.exp_avg_sq[rows].to(self.wide), mean
        )
        self.exp_avg[rows], self.exp_avg_sq[rows] = m.to(self.dtype), v.to(self.dtype)
        self.step_count += 1

    def state_dict(self) -> dict[str, Any]:
        """The state, as ``CapoFilter.state_dict``."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state, as ``CapoFilter.load_state_dict``, unchecked."""
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])
        self.step_count = state["step"]

    def _precondition(self, ids: Tensor, g: Tensor) -> Tensor:
        """P(g) ``[N, k, H]``."""
        if self.step_count == 0:
            return g
        (beta1, beta2), eps, n = self.config.betas, self.config.eps, self.step_count + 1
        m, v = self._move(self.exp_avg[ids], self.exp_avg_sq[ids], g)
        if self.reuse_temporaries:
            return m.div_(1 - beta1**n) / v.div_(1 - beta2**n).sqrt_().add_(eps)
        m_hat = m / (1 - beta1**n)
        v_hat = v / (1 - beta2**n)
        return m_hat / (v_hat.sqrt() + eps)

    def _move(self, M: Tensor, Q: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """The moments of some rows, copied out of the tables, after a gradient."""
        beta1, beta2 = self.config.betas
        if self.reuse_temporaries:
            return M.mul_(beta1).add_(g, alpha=1 - beta1), Q.mul_(beta2).addcmul_(
                g, g, value=1 - beta2
            )
        m = beta1 * M + (1 - beta1) * g
        v = beta2 * Q + (1 - beta2) * g**2
        return m, v

    def _project(self, P: Tensor, hidden: Tensor) -> Tensor:
        """u = P(g) h ``[N, k]``."""
        if self.reuse_temporaries:
            return torch.matmul(P, hidden[..., None])[..., 0]
        return (P * hidden[:, None]).sum(-1)
