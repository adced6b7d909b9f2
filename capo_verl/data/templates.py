# SPDX-License-Identifier: Apache-2.0
"""Templates that make a question a prompt, and the place of the answer in a response."""

from __future__ import annotations

from dataclasses import dataclass

Messages = list[dict[str, str]]

STEP_BY_STEP = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Template:
    """One way to ask."""

    system: str | None
    user: str
    """Text of the user's message; ``{question}`` stands for the question."""
    answer_format: str
    """Place of the answer in a response.

    ``boxed`` (a box or answer tags, whichever is last), ``tags`` (answer tags only) or ``plain``
    (the whole response). Kept in ``extra_info.answer_format``.
    """

    def messages(self, question: str) -> Messages:
        """Chat messages for one question."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, {"role": "user", "content": self.user.replace("{question}", question)}]


TEMPLATES = {
    # Qwen2.5-Math's own instruction, as system prompt.
    "qwen-math": Template(STEP_BY_STEP, "{question}", "boxed"),
    "boxed": Template(None, "{question}\n" + STEP_BY_STEP, "boxed"),
    "tags": Template(
        None,
        "{question}\nThink step by step, then give your final answer between <answer> and "
        "</answer>, without any other text.",
        "tags",
    ),
    "plain": Template(None, "{question}", "plain"),
}
