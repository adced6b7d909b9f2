# SPDX-License-Identifier: Apache-2.0
"""Random batches for the filter, and the oracle's decision about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from capo_verl import CapoConfig
from tests.helpers.oracle import Oracle, Token, make_token


@dataclass
class Batch:
    """Arrays ``[B, T, ...]`` in float64."""

    hidden: np.ndarray
    logits: np.ndarray
    actions: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray

    @classmethod
    def random(
        cls, rng: np.random.Generator, b: int, t: int, h: int, v: int, ties: bool = False
    ) -> Batch:
        logits = 2 * rng.standard_normal((b, t, v))
        if ties:
            logits = np.round(logits)
        return cls(
            rng.standard_normal((b, t, h)) / np.sqrt(h),
            logits,
            rng.integers(0, v, (b, t)),
            rng.choice([-1.5, -0.5, 0.0, 0.5, 1.5], (b, 1)) * np.ones((b, t)),
            rng.random((b, t)) < 0.8,
        )

    def arguments(self, lr: float, dtype: torch.dtype = torch.float64):
        """Positional arguments of ``CapoFilter.evaluate``."""
        hidden, logits, advantages = (
            torch.from_numpy(x).to(dtype) for x in (self.hidden, self.logits, self.advantages)
        )
        return (
            hidden,
            logits,
            torch.from_numpy(self.actions),
            advantages,
            torch.from_numpy(self.mask),
            lr,
        )

    def tokens(self, top_k: int | None) -> list[list[Token]]:
        b, t = self.actions.shape
        return [
            [
                make_token(
                    self.hidden[i, j],
                    self.logits[i, j],
                    self.actions[i, j],
                    self.advantages[i, j],
                    top_k,
                )
                for j in range(t)
            ]
            for i in range(b)
        ]


def inside(config: CapoConfig, m_h: float, m_f: float) -> bool:
    """The trust region, spelled out."""
    high, low = config.objective_shift_max, config.objective_shift_min
    if high and not m_h < high:
        return False
    if high and low == "symmetric" and not m_h > -high:
        return False
    if isinstance(low, float | int) and not m_h >= low:
        return False
    return not (config.policy_shift_max and not m_f < config.policy_shift_max)


def oracle_decision(oracle: Oracle, config: CapoConfig, batch: Batch, lr: float):
    """``(m_H, m_F)`` of the first stage ``[B, T]`` each, and the accepted tokens ``[B, T]`` after
    all stages.
    """
    tokens = batch.tokens(config.top_k)
    b, t = batch.actions.shape
    accepted, first = batch.mask.copy(), None
    for stage in config.stages:
        values = np.zeros((2, b, t))
        kept = [[tokens[i][j] for j in range(t) if accepted[i, j]] for i in range(b)]
        for i in range(b):
            for j in range(t):
                if stage == "token":
                    values[:, i, j] = oracle.token_shifts(tokens[i][j], lr)
                elif accepted[i, j]:
                    values[:, i, j] = oracle.set_shifts(
                        [kept[i]] if stage == "sequence" else kept, lr
                    )
        first = values if first is None else first
        accepted = accepted & np.array(
            [[inside(config, *values[:, i, j]) for j in range(t)] for i in range(b)]
        )
    return first[0], first[1], accepted
