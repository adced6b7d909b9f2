# SPDX-License-Identifier: Apache-2.0
"""``gym``: reasoning-gym's ``palindrome_generation``, one character per token.

The family's own scorer judges.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from capo_verl.experiments.study.tasks.base import Problems, Task

FAMILY = "palindrome_generation"
END, PAD, ASK = 26, 27, 28  # behind the letters, 0..25
POOL, HELD_OUT = 20_000, 2_000


class Palindromes(Task):
    """Palindromes of scrambled letters.

    The prompt has the letters, padded on the left; the response a palindrome of exactly these, and
    an end token.

    Many answers are right. The family scores 1 for those, and 0.02 to 0.05 for consolation;
    :meth:`correct` counts the 1s.

    Args:
        letters: longest palindrome; the shortest has 4.
        graded: reward the family's own score, consolation included.
    """

    vocab_size = 32
    end = END
    competence = 0.7

    def __init__(self, letters: int = 9, graded: bool = False):
        if not 4 <= letters <= 12:
            raise ValueError(f"task_knobs.letters={letters!r}: expected 4 to 12")
        self.letters, self.graded = letters, graded
        self.prompt_length = letters + 1
        self.response_length = letters + 1

    @cached_property
    def dataset(self) -> Any:
        """reasoning-gym's data set of :data:`POOL` problems."""
        import reasoning_gym

        return reasoning_gym.create_dataset(
            FAMILY, size=POOL, seed=0, min_length=4, max_length=self.letters
        )

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        return [self.dataset[i] for i in range(POOL)]

    @cached_property
    def _tokens(self) -> tuple[Tensor, Tensor]:
        prompts = torch.full((POOL, self.prompt_length), PAD)
        answers = torch.full((POOL, self.response_length), END)
        for i, entry in enumerate(self.entries):
            letters = encode(entry["metadata"]["letters"])
            prompts[i, self.letters - len(letters) : self.letters] = letters
            answers[i, : len(letters)] = encode(entry["answer"])
        prompts[:, -1] = ASK
        return prompts, answers

    def problems(self, n: int, generator: torch.Generator, held_out: bool = False) -> Problems:
        low, high = (POOL - HELD_OUT, POOL) if held_out else (0, POOL - HELD_OUT)
        index = torch.randint(low, high, (n,), generator=generator)
        return Problems(self._tokens[0][index], index[:, None])

    def demonstrations(self, problems: Problems, generator: torch.Generator) -> Tensor:
        return self._tokens[1][problems.key[:, 0]]

    def correct(self, problems: Problems, responses: Tensor) -> Tensor:
        return (self.scores(problems, responses) == 1).float()

    def reward(self, problems: Problems, responses: Tensor) -> Tensor:
        scores = self.scores(problems, responses)
        return scores if self.graded else (scores == 1).float()

    def scores(self, problems: Problems, responses: Tensor) -> Tensor:
        """Score ``[N]`` float32, the family's own; 0 without an end token."""
        entries, score = self.entries, self.dataset.score_answer
        texts = [decode(row) for row in responses.tolist()]
        pairs = zip(problems.key[:, 0].tolist(), texts, strict=True)
        return torch.tensor([0.0 if text is None else score(text, entries[i]) for i, text in pairs])


def encode(letters: list[str] | str) -> Tensor:
    """Token ids of lower-case letters."""
    return torch.tensor([ord(letter) - ord("a") for letter in letters])


def decode(tokens: list[int]) -> str | None:
    """The text before the first end token; None without one. What is no letter becomes ``?``."""
    if END not in tokens:
        return None
    return "".join(chr(ord("a") + t) if t < END else "?" for t in tokens[: tokens.index(END)])
