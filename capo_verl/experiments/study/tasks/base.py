# SPDX-License-Identifier: Apache-2.0
"""Tasks of the tiny tier: problems of one length, demonstrations, a score and an end token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Problems(NamedTuple):
    """A batch of problems, int64 tensors that repeat over completions by plain indexing."""

    prompts: Tensor
    """``[N, prompt_length]`` token ids, padded by tokens the model sees."""
    key: Tensor
    """``[N, K]``: what the scorer needs to know."""

    def repeat(self, times: int) -> Problems:
        """Each problem ``times`` times in a row: the completions of a group are neighbours."""
        return Problems(*(x.repeat_interleave(times, 0) for x in self))


class Task(ABC):
    """A family of problems with a verifiable reward."""

    vocab_size: int
    prompt_length: int
    response_length: int
    """Longest response."""
    end: int | None = None
    """Token that ends a response early, if the task has one."""
    competence: float | None = None
    """Accuracy that ``noisy`` warm starts begin with, where the recipe's is out of reach."""
    graded: bool = False
    """True if the reward has values between 0 and 1."""

    @abstractmethod
    def problems(self, n: int, generator: torch.Generator, held_out: bool = False) -> Problems:
        """Draw ``n`` problems.

        ``held_out``: from those which training never shows, where the task is small enough to need
        it.
        """

    @abstractmethod
    def demonstrations(self, problems: Problems, generator: torch.Generator) -> Tensor:
        """Correct responses ``[N, response_length]`` for the warm start."""

    @abstractmethod
    def correct(self, problems: Problems, responses: Tensor) -> Tensor:
        """Correctness ``[N]`` float32, 1 where the response ``[N, response_length]`` is right."""

    def reward(self, problems: Problems, responses: Tensor) -> Tensor:
        """Reward ``[N]`` float32 in [0, 1]; :meth:`correct` unless the task grades."""
        return self.correct(problems, responses)

    def mask(self, responses: Tensor) -> Tensor:
        """Mask ``[N, response_length]`` bool: up to and including the first ``end``."""
        if self.end is None:
            return torch.ones_like(responses, dtype=torch.bool)
        ended = (responses == self.end).cumsum(-1)
        return (ended == 0) | ((ended == 1) & (responses == self.end))
