# SPDX-License-Identifier: Apache-2.0
"""``fillers``: sorting in which most rare tokens carry no signal.

Filler tokens between the digits, which the reward ignores, are those.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from capo_verl.experiments.study.tasks.base import Problems, Task

SEPARATOR = 10
FIRST_FILLER = 16


class Fillers(Task):
    """Sorted digits with fillers between them.

    The prompt has digits and a separator; the fillers of the response come from a heavy-tailed
    distribution.

    A response ends with its last digit (or when its room is used up: then it is wrong); which
    fillers stand where does not matter. Demonstrations hold a filler with probability ``share`` at
    every place, number ``i`` of them with probability proportional to ``1 / (i + 1) ** tail``.

    Args:
        digits: how many.
        share: expected share of fillers in a response, in [0, 0.8].
        fillers: how many different ones.
        tail: exponent of their frequencies.
    """

    competence = 0.8

    def __init__(self, digits: int = 8, share: float = 0.5, fillers: int = 48, tail: float = 1.0):
        if not 0 <= share <= 0.8:
            raise ValueError(f"task_knobs.share={share!r}: expected 0 to 0.8")
        self.digits, self.share = digits, share
        self.vocab_size = FIRST_FILLER + fillers
        self.prompt_length = digits + 1
        expected = digits / (1 - share)
        # Four standard deviations of the negative binomial above its mean.
        self.response_length = (
            digits
            if share == 0
            else math.ceil(expected + 4 * math.sqrt(expected * share / (1 - share)))
        )
        self.weights = (torch.arange(fillers) + 1.0) ** -tail

    def problems(self, n: int, generator: torch.Generator, held_out: bool = False) -> Problems:
        digits = torch.randint(10, (n, self.digits), generator=generator)
        return Problems(
            torch.cat((digits, torch.full((n, 1), SEPARATOR)), 1), digits.sort(-1).values
        )

    def demonstrations(self, problems: Problems, generator: torch.Generator) -> Tensor:
        n, t = len(problems.key), self.response_length
        filler = torch.rand(n, t, generator=generator) < self.share
        # The last digit needs a place: late fillers give way where the room would not suffice.
        missing = self.digits - (~filler).sum(-1)
        late = filler & (filler.flip(-1).cumsum(-1).flip(-1) <= missing[:, None])
        filler &= ~late
        place = ((~filler).cumsum(-1) - 1).clamp(0, self.digits - 1)
        drawn = (
            torch.multinomial(self.weights, n * t, replacement=True, generator=generator).view(n, t)
            + FIRST_FILLER
        )
        return torch.where(filler, drawn, problems.key.gather(1, place))

    def mask(self, responses: Tensor) -> Tensor:
        """Mask up to and including the digit that completes the answer."""
        written = (responses < FIRST_FILLER).cumsum(-1)
        return torch.cat((torch.zeros_like(written[:, :1]), written[:, :-1]), 1) < self.digits

    def correct(self, problems: Problems, responses: Tensor) -> Tensor:
        answer = (responses < FIRST_FILLER) & self.mask(responses)
        place = (answer.cumsum(-1) - 1).clamp(0, self.digits - 1)
        wrong = answer & (responses != problems.key.gather(1, place))
        return ((answer.sum(-1) == self.digits) & ~wrong.any(-1)).float()
