# SPDX-License-Identifier: Apache-2.0
"""One step of GRPO with Adam as the formulas are, in float64: every logit, every parameter by hand,
one token at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from capo_verl.commands.calibrate.rollouts import Rollouts
from tests.helpers.oracle import Oracle, Token, make_token


class NaiveRun:
    """A model trained by hand, and the oracle of the filter beside it."""

    def __init__(self, model: Any, lr: float, top_k: int | None, max_norm: float):
        self.model, self.lr, self.top_k, self.max_norm = (
            copy.deepcopy(model).eval(),
            lr,
            top_k,
            max_norm,
        )
        head = self.model.get_output_embeddings().weight
        self.oracle = Oracle(*head.shape, top_k=top_k)
        self.first = {n: torch.zeros_like(p) for n, p in self.model.named_parameters()}
        self.second = {n: torch.zeros_like(p) for n, p in self.model.named_parameters()}
        self.steps = 0

    def tokens(self, rollouts: Rollouts) -> list[list[Token]]:
        """The oracle's tokens, sequence by sequence."""
        found = []
        for ids, mask, advantage in zip(
            rollouts.input_ids, rollouts.response_mask, rollouts.advantages, strict=True
        ):
            with torch.no_grad():
                output = self.model(input_ids=ids[None], output_hidden_states=True)
            hidden, logits = output.hidden_states[-1][0].numpy(), output.logits[0].numpy()
            found.append(
                [
                    make_token(
                        hidden[t - 1], logits[t - 1], int(ids[t]), float(advantage), self.top_k
                    )
                    for t in range(1, len(ids))
                    if mask[t]
                ]
            )
        return found

    def shifts(self, rollouts: Rollouts) -> np.ndarray:
        """``[N, 2]``: m_H and m_F of every token."""
        return np.array(
            [self.oracle.token_shifts(t, self.lr) for s in self.tokens(rollouts) for t in s]
        )

    def log_probs(self, rollouts: Rollouts, model: Any = None) -> list[np.ndarray]:
        """``[V]`` of every response token."""
        found = []
        for ids, mask in zip(rollouts.input_ids, rollouts.response_mask, strict=True):
            with torch.no_grad():
                logits = (model or self.model)(input_ids=ids[None]).logits[0]
            found += [logits[t - 1].log_softmax(-1).numpy() for t in range(1, len(ids)) if mask[t]]
        return found

    def step(self, rollouts: Rollouts) -> dict[str, torch.Tensor]:
        """Train; returns the parameters before."""
        accepted = [t for s in self.tokens(rollouts) for t in s]
        loss = torch.zeros((), dtype=torch.float64)
        for ids, mask, advantage in zip(
            rollouts.input_ids, rollouts.response_mask, rollouts.advantages, strict=True
        ):
            log_probs = self.model(input_ids=ids[None]).logits[0].log_softmax(-1)
            taken = [log_probs[t - 1, ids[t]] for t in range(1, len(ids)) if mask[t]]
            loss = loss - advantage * sum(taken) / len(taken) / len(rollouts.input_ids)
        named = dict(self.model.named_parameters())
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
        self.steps += 1
        before = {n: p.detach().clone() for n, p in named.items()}
        for name, p in named.items():
            g = gradients[name] * min(1.0, self.max_norm / (float(norm) + 1e-6))
            self.first[name] = 0.9 * self.first[name] + 0.1 * g
            self.second[name] = 0.999 * self.second[name] + 0.001 * g**2
            m, v = (
                self.first[name] / (1 - 0.9**self.steps),
                self.second[name] / (1 - 0.999**self.steps),
            )
            with torch.no_grad():
                p -= self.lr * m / (v.sqrt() + 1e-8)
        self.oracle.update(accepted)
        return before

    def moved_only(self, before: dict[str, torch.Tensor], moves: Callable[[str], bool]) -> Any:
        """The model with the parameters that do not move put back."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not moves(name):
                    p.copy_(before[name])
        return model
