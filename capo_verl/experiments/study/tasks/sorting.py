# SPDX-License-Identifier: Apache-2.0
"""``sort8``: write eight digits in ascending order. Responses of 8 tokens, one right answer."""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.experiments.study.tasks.base import Problems, Task

SEPARATOR = 10


class Sorting(Task):
    """Sorted digits.

    The prompt has ``digits`` digits and a separator, the response the digits sorted. Tokens 11-15
    exist and are never right.

    Args:
        digits: how many.
        graded: reward the share of places that are right instead of all or nothing.
    """

    vocab_size = 16

    def __init__(self, digits: int = 8, graded: bool = False):
        self.graded = graded
        self.response_length = digits
        self.prompt_length = digits + 1

    def problems(self, n: int, generator: torch.Generator, held_out: bool = False) -> Problems:
        digits = torch.randint(10, (n, self.response_length), generator=generator)
        return Problems(
            torch.cat((digits, torch.full((n, 1), SEPARATOR)), 1), digits.sort(-1).values
        )

    def demonstrations(self, problems: Problems, generator: torch.Generator) -> Tensor:
        return problems.key

    def correct(self, problems: Problems, responses: Tensor) -> Tensor:
        return (responses == problems.key).all(-1).float()

    def reward(self, problems: Problems, responses: Tensor) -> Tensor:
        return (
            (responses == problems.key).float().mean(-1)
            if self.graded
            else self.correct(problems, responses)
        )
