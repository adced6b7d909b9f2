# SPDX-License-Identifier: Apache-2.0
"""Families of text problems with a verifiable reward, all problems known in advance.

A response is right if it ends, and what it says is; the wording is free.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from capo_verl.experiments.study.pretrained.vocabulary import Vocabulary
from capo_verl.experiments.study.tasks import Problems, Task

HELD_OUT = 5
"""Every so-manieth problem is never trained on."""
NUMBER = re.compile(r"\d+")


class TextTask(Task):
    """Problems as text.

    Args:
        vocabulary: of the model.
        response_length: tokens, the end included.
    """

    sft: Mapping[str, Any]
    """Recipe of the warm start."""

    def __init__(self, vocabulary: Vocabulary, response_length: int):
        self.vocabulary, self.response_length = vocabulary, response_length
        self.vocab_size, self.end = vocabulary.size, vocabulary.end
        self.prompt_length = self._prompts.shape[1]

    @cached_property
    @abstractmethod
    def entries(self) -> list[Any]:
        """All problems, in an order that never changes."""

    @abstractmethod
    def question(self, entry: Any) -> str: ...

    @abstractmethod
    def wordings(self, entry: Any) -> list[str]:
        """Right responses, the same number for every problem."""

    @abstractmethod
    def is_right(self, entry: Any, text: str) -> bool: ...

    @cached_property
    def _prompts(self) -> Tensor:
        """``[entries, P]``, padded on the left."""
        found = [self.vocabulary.prompt(self.question(entry)) for entry in self.entries]
        length = max(map(len, found))
        return torch.tensor([[self.vocabulary.pad] * (length - len(p)) + p for p in found])

    def problems(self, n: int, generator: torch.Generator, held_out: bool = False) -> Problems:
        index = torch.arange(len(self.entries))
        index = index[(index % HELD_OUT == 0) == held_out]
        index = index[torch.randint(len(index), (n,), generator=generator)]
        return Problems(self._prompts[index], index[:, None])

    def demonstrations(self, problems: Problems, generator: torch.Generator) -> Tensor:
        rows = []
        for index in problems.key[:, 0].tolist():
            texts = self.wordings(self.entries[index])
            text = texts[int(torch.randint(len(texts), (), generator=generator))]
            tokens = self.vocabulary.encode(text)[: self.response_length - 1]
            rows.append(tokens + [self.vocabulary.end] * (self.response_length - len(tokens)))
        return torch.tensor(rows)

    def correct(self, problems: Problems, responses: Tensor) -> Tensor:
        pairs = zip(problems.key[:, 0].tolist(), responses.tolist(), strict=True)
        return torch.tensor([float(self._is_right(i, tokens)) for i, tokens in pairs])

    def _is_right(self, index: int, tokens: list[int]) -> bool:
        if self.vocabulary.end not in tokens:
            return False
        text = self.vocabulary.decode(tokens[: tokens.index(self.vocabulary.end)])
        return self.is_right(self.entries[index], text)


class Addition(TextTask):
    """``45 + 7``: the last number of the response is the sum, in any of several wordings."""

    sft = {"lr": 2.5e-5, "batch": 8, "steps": [8, 14]}
    STYLES = (
        "{e} = {c}.", "The answer is {c}.", "It is {c}.", "The sum is {c}.", "{e} equals {c}.",
        "Adding them gives {c}.", "That makes {c}.",
    )  # fmt: skip

    def __init__(self, vocabulary: Vocabulary, response_length: int = 14):
        super().__init__(vocabulary, response_length)

    @cached_property
    def entries(self) -> list[tuple[int, int]]:
        pairs = [(a, b) for a in range(10, 100) for b in range(2, 10)]
        random.Random(0).shuffle(pairs)
        return pairs

    def question(self, entry: tuple[int, int]) -> str:
        return f"{entry[0]} + {entry[1]}"

    def wordings(self, entry: tuple[int, int]) -> list[str]:
        return [style.format(e=self.question(entry), c=sum(entry)) for style in self.STYLES]

    def is_right(self, entry: tuple[int, int], text: str) -> bool:
        numbers = NUMBER.findall(text)
        return bool(numbers) and numbers[-1] == str(sum(entry))


class Sorting(TextTask):
    """``sort 61, 33, 78``: reasoning-gym's ``number_sorting``, ascending, by its own scorer, in
    fewer words than its own question.

    Args:
        numbers: at least and at most so many, of two digits.
    """

    sft = {"lr": 6e-5, "batch": 8, "steps": [12, 20]}
    FAMILY, POOL = "number_sorting", 2000
    STYLES = (("[", ", ", "]"), ("[", ",", "]"), ("['", "', '", "']"))

    def __init__(
        self, vocabulary: Vocabulary, numbers: tuple[int, int] = (3, 5), response_length: int = 40
    ):
        self.numbers = tuple(numbers)
        super().__init__(vocabulary, response_length)

    @cached_property
    def dataset(self) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(
            self.FAMILY, seed=0, size=4 * self.POOL, min_numbers=self.numbers[0],
            max_numbers=self.numbers[1], min_value=10, max_value=99, min_decimals=0,
            max_decimals=0,
        )  # fmt: skip

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for entry in self.dataset:
            if entry["metadata"]["direction"] == "ascending":
                found.append(entry)
            if len(found) == self.POOL:
                break
        return found

    @staticmethod
    def _integers(numbers: list[str]) -> list[str]:
        return [str(int(float(number))) for number in numbers]

    def question(self, entry: dict[str, Any]) -> str:
        return "sort " + ", ".join(self._integers(entry["metadata"]["original_numbers"]))

    def wordings(self, entry: dict[str, Any]) -> list[str]:
        numbers = self._integers(entry["metadata"]["sorted_numbers"])
        return [first + between.join(numbers) + last for first, between, last in self.STYLES]

    def is_right(self, entry: dict[str, Any], text: str) -> bool:
        return bool(self.dataset.score_answer(text, entry) == 1)


FAMILIES: dict[str, type[TextTask]] = {"addition": Addition, "sorting": Sorting}


def make_text_task(name: str, knobs: Mapping[str, Any], vocabulary: Vocabulary) -> TextTask:
    """
    Raises:
        ValueError: for a knob that the task does not have.
    """
    try:
        return FAMILIES[name](vocabulary, **knobs)
    except TypeError as e:
        raise ValueError(f"task_knobs={dict(knobs)}: {e}") from None
