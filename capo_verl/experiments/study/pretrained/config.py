# SPDX-License-Identifier: Apache-2.0
"""The keys of a run of the pretrained tier. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from capo_verl.experiments.study.config import LoopConfig, _one_of

MODELS = ("smollm2", "random")
TASKS = ("addition", "sorting")


@dataclass(frozen=True)
class PretrainedConfig(LoopConfig):
    """One run: a model, a task, a method and a seed.

    Raises:
        ValueError: as :class:`LoopConfig`.
    """

    tier: ClassVar[str] = "pretrained"
    default_top_k: ClassVar[int | None] = 50
    keeps_steps: ClassVar[bool] = True

    model: str = "smollm2"
    """``smollm2``, SmolLM2-135M-Instruct, or ``random``, a tiny model of bytes for tests."""
    lora: int | None = None
    """Rank of LoRA adapters on all linear layers but the LM head; None: full fine-tuning."""
    sft: dict[str, Any] = field(default_factory=dict)
    """Recipe of the warm start, over the task's own: ``lr``, ``batch``, ``steps`` (of the runs
    whose weights are averaged).
    """
    task: str = "addition"
    lr: float = 1e-5
    steps: int = 40
    warmup: int = 5
    prompts: int = 2
    group: int = 8
    evaluations: int = 1
    eval_prompts: int = 128
    kl_every: int = 1
    tokens_every: int | None = None
    """Writes all sequences of every so-manieth step, with what the filter saw of each token, into
    ``tokens/RUN_ID`` of the cache, for ``capo-verl report``. Needs a filter, or ``mode: track``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("model", self.model, MODELS)
        rank = self.lora
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise ValueError(f"lora={rank!r}: expected an integer >= 1, or null for full tuning")
        if (
            self.tokens_every is not None
            and (self.capo_knobs() or {"mode": "off"}).get("mode") == "off"
        ):
            raise ValueError(
                f"tokens_every={self.tokens_every!r}: needs capo, with mode=track to drop nothing"
            )
        if unknown := sorted(set(self.sft) - {"lr", "batch", "steps"}):
            raise ValueError(f"sft.{unknown[0]}: expected lr, batch and steps only")

    @classmethod
    def known_tasks(cls) -> tuple[str, ...]:
        return TASKS

    @property
    def warm_start(self) -> dict[str, Any]:
        return {
            "model": self.model, "task": self.task, "task_knobs": self.task_knobs, "sft": self.sft,
        }  # fmt: skip
