# SPDX-License-Identifier: Apache-2.0
"""``long``: insertion sort written out pass by pass, 120 tokens by default.

Only the last list is rewarded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.experiments.study.tasks.base import Problems, Task

SEPARATOR = 10


class InsertionSort(Task):
    """Sorting by insertion, pass by pass.

    The prompt has digits and a separator; the response the whole list and a separator after each of
    ``digits - 1`` passes.

    Pass i inserts digit i into the sorted digits before it. The reward looks at the last list
    alone, as the reward of a long chain of thought looks at the answer.

    Args:
        digits: list length n; a response has (n - 1) (n + 1) tokens.
    """

    vocab_size = 16
    competence = 0.8

    def __init__(self, digits: int = 11):
        if not 3 <= digits <= 15:
            raise ValueError(f"task_knobs.digits={digits!r}: expected 3 to 15")
        self.digits = digits
        self.prompt_length = digits + 1
        self.response_length = (digits - 1) * (digits + 1)

    def problems(self, n: int, generator: torch.Generator, held_out: bool = False) -> Problems:
        digits = torch.randint(10, (n, self.digits), generator=generator)
        return Problems(torch.cat((digits, torch.full((n, 1), SEPARATOR)), 1), digits)

    def demonstrations(self, problems: Problems, generator: torch.Generator) -> Tensor:
        separator = torch.full((len(problems.key), 1), SEPARATOR)
        parts = []
        for i in range(2, self.digits + 1):
            parts += [problems.key[:, :i].sort(-1).values, problems.key[:, i:], separator]
        return torch.cat(parts, 1)

    def correct(self, problems: Problems, responses: Tensor) -> Tensor:
        last = responses[:, -self.digits - 1 :]
        sorted_ = (last[:, :-1] == problems.key.sort(-1).values).all(-1)
        return (sorted_ & (last[:, -1] == SEPARATOR)).float()
