# SPDX-License-Identifier: Apache-2.0
"""CAPO written as the formulas are: dense, float64, one token at a time. Slow on purpose; every
fast path is held to it.

Symbols follow docs/algorithm.md: ``h`` hidden state, ``S`` support, ``pi`` probabilities
renormalised over S, ``e`` one-hot of the taken token in S (zero outside), ``v = e - pi``, ``A``
advantage, ``g = A v h^T`` gradient, ``P(g)`` preconditioned gradient, ``u = P(g) h``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Token:
    """One response token: its support row ids ``[k]``, ``pi [k]``, ``v [k]``, ``h [H]`` and
    advantage.
    """

    rows: np.ndarray
    pi: np.ndarray
    v: np.ndarray
    h: np.ndarray
    advantage: float

    @property
    def g(self) -> np.ndarray:
        return self.advantage * np.outer(self.v, self.h)


def support(logits: np.ndarray, top_k: int | None) -> np.ndarray:
    """Ids of the k largest logits; of equal logits the lower id comes first."""
    order = np.argsort(-logits, kind="stable")
    return order if top_k is None else order[:top_k]


def make_token(
    hidden: np.ndarray, logits: np.ndarray, action: int, advantage: float, top_k: int | None
) -> Token:
    rows = support(logits, top_k)
    z = np.exp(logits[rows] - logits[rows].max())
    pi = z / z.sum()
    e = (rows == action).astype(np.float64)
    return Token(rows, pi, e - pi, hidden, float(advantage))


@dataclass
class Oracle:
    """State of the optimizer model plus the evaluation of one batch ``[B, T]``."""

    vocab_size: int
    hidden_size: int
    optimizer_model: str = "adam"
    top_k: int | None = 50
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    policy_shift: str = "sampled"
    step_count: int = 0
    exp_avg: np.ndarray = field(init=False)
    exp_avg_sq: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.exp_avg = np.zeros((self.vocab_size, self.hidden_size))
        self.exp_avg_sq = np.zeros((self.vocab_size, self.hidden_size))

    def precondition(self, rows: np.ndarray, g: np.ndarray) -> np.ndarray:
        """``P(g)`` for the given rows ``[k]`` and gradient ``[k, H]``."""
        if self.optimizer_model == "sgd" or self.step_count == 0:
            return g
        b1, b2 = self.betas
        n = self.step_count + 1
        m = (b1 * self.exp_avg[rows] + (1 - b1) * g) / (1 - b1**n)
        q = (b2 * self.exp_avg_sq[rows] + (1 - b2) * g**2) / (1 - b2**n)
        return m / (np.sqrt(q) + self.eps)

    def shifts(
        self, token: Token, u: np.ndarray, lr: float, linear: float | None = None
    ) -> tuple[float, float]:
        """``m_H`` and ``m_F`` of one token along the direction whose image is ``u = P(.) h``."""
        d = token.v @ u
        variance = token.pi @ u**2 - (token.pi @ u) ** 2  # u^T F u
        if linear is None:
            linear = lr * token.advantage * d
        m_h = linear + 0.5 * lr**2 * token.advantage * (d**2 - variance)
        return m_h, 0.5 * lr**2 * (variance if self.policy_shift == "exact" else d**2)

    def token_shifts(self, token: Token, lr: float) -> tuple[float, float]:
        return self.shifts(token, self.precondition(token.rows, token.g) @ token.h, lr)

    def mean_gradient(self, tokens: list[Token]) -> tuple[np.ndarray, np.ndarray]:
        """``G_j`` = mean of ``g_j`` over the tokens whose support holds j; and the number of such
        tokens, ``[V]``.
        """
        total = np.zeros((self.vocab_size, self.hidden_size))
        count = np.zeros(self.vocab_size)
        for token in tokens:
            total[token.rows] += token.g
            count[token.rows] += 1
        return total / np.maximum(count, 1)[:, None], count

    def set_shifts(self, sequences: list[list[Token]], lr: float) -> tuple[float, float]:
        """``m_H``, ``m_F`` of a set of tokens: one direction for all, averaged per sequence, then
        over sequences.
        """
        sequences = [s for s in sequences if s]
        if not sequences:
            return 0.0, 0.0
        gradient, count = self.mean_gradient([t for s in sequences for t in s])
        touched = np.flatnonzero(count)
        direction = np.zeros_like(gradient)
        direction[touched] = self.precondition(touched, gradient[touched])
        linear = lr * float((gradient * direction).sum())
        per_sequence = []
        for s in sequences:
            values = [self.shifts(t, direction[t.rows] @ t.h, lr, linear) for t in s]
            per_sequence.append(np.mean(values, axis=0))
        m_h, m_f = np.mean(per_sequence, axis=0)
        return float(m_h), float(m_f)

    def update(self, tokens: list[Token]) -> None:
        """Moments after one optimizer step on the accepted tokens; rows nobody touched keep
        theirs.
        """
        if not tokens:
            return
        gradient, count = self.mean_gradient(tokens)
        b1, b2 = self.betas
        rows = np.flatnonzero(count)
        self.exp_avg[rows] = b1 * self.exp_avg[rows] + (1 - b1) * gradient[rows]
        self.exp_avg_sq[rows] = b2 * self.exp_avg_sq[rows] + (1 - b2) * gradient[rows] ** 2
        self.step_count += 1
