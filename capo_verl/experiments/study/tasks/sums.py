# SPDX-License-Identifier: Apache-2.0
"""``sums``: add several digits, writing every intermediate result.

Only the last result is rewarded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capo_verl.experiments.study.tasks.base import Problems, Task

PLUS, EQUALS, END = 10, 11, 12


class Sums(Task):
    """Running sums.

    The prompt is ``3+4+8=``; the response the sums in two digits each, ``07`` ``15``, and an end
    token.

    The reward looks at the number before the end token: a response may take fewer or other steps.

    Args:
        terms: how many digits are added; their sum must stay below 100.
    """

    vocab_size = 16
    end = END

    def __init__(self, terms: int = 5):
        if not 2 <= terms <= 11:
            raise ValueError(
                f"task_knobs.terms={terms!r}: expected 2 to 11, so that sums have two digits"
            )
        self.terms = terms
        self.prompt_length = 2 * terms
        self.response_length = 2 * (terms - 1) + 1

    def problems(self, n: int, generator: torch.Generator, held_out: bool = False) -> Problems:
        digits = torch.randint(10, (n, self.terms), generator=generator)
        prompts = torch.full((n, self.prompt_length), PLUS)
        prompts[:, 0::2] = digits
        prompts[:, -1] = EQUALS
        return Problems(prompts, digits.cumsum(-1)[:, 1:])

    def demonstrations(self, problems: Problems, generator: torch.Generator) -> Tensor:
        n = len(problems.key)
        digits = torch.stack((problems.key // 10, problems.key % 10), -1).view(n, -1)
        return torch.cat((digits, torch.full((n, 1), END)), 1)

    def correct(self, problems: Problems, responses: Tensor) -> Tensor:
        is_end = responses == END
        last = is_end.int().argmax(-1, keepdim=True)  # of the first end token
        ends = is_end.any(-1) & (last[:, 0] >= 2)
        tens, ones = (responses.gather(1, (last - back).clamp(min=0))[:, 0] for back in (2, 1))
        right = (tens < 10) & (ones < 10) & (10 * tens + ones == problems.key[:, -1])
        return (ends & right).float()
