# SPDX-License-Identifier: Apache-2.0
"""The warm start: a short, seeded supervised run to where RL has something to improve.

The model first imitates right answers until it can do the task, then answers of which a share
carries a typo. It ends up knowing how to answer and answering right only some of the time, which is
the state RL starts from in practice, and one whose accuracy hardly depends on the machine.
(Stopping half-way through learning instead lands anywhere between 4 % and 54 % depending on the
seed.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_verl.cpu.quickstart.model import ModelConfig, build_model, build_tokenizer, save
from capo_verl.cpu.quickstart.task import TaskConfig, chat_prompt, generate
from capo_verl.data.cache import cached_folder

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2Tokenizer

Progress = Callable[[int, int, float], None]
"""Called with (step, steps, loss)."""


@dataclass(frozen=True)
class SftConfig:
    """The supervised run: AdamW, linear warm-up, then half a cosine."""

    steps: int = 900
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 50
    typo_start: float = 0.6
    """Fraction of the run after which demonstrations carry typos."""
    typo_rate: float = 0.6
    """Share of the demonstrations with a typo from then on."""
    seed: int = 0


def warm_start(
    task: TaskConfig,
    model: ModelConfig,
    sft: SftConfig,
    progress: Progress | None = None,
    root: Path | None = None,
) -> tuple[Path, bool]:
    """Folder with the warm-started model in Hugging Face format, and whether it was cached."""
    import torch

    recipe = {
        "task": task.recipe(),
        "model": model.recipe(),
        "sft": asdict(sft),
        "torch": torch.__version__,
    }

    def build(folder: Path) -> None:
        _train(task, model, sft, progress or (lambda *_: None), folder)

    return cached_folder("model", recipe, build, root)


def with_typo(answer: str, rng: random.Random) -> str:
    """Answer with two neighbours swapped, one character dropped or one doubled."""
    i = rng.randrange(len(answer) - 1)
    kind = rng.choice(("swap", "drop", "double"))
    if kind == "swap":
        return answer[:i] + answer[i + 1] + answer[i] + answer[i + 2 :]
    return answer[:i] + answer[i + 1 :] if kind == "drop" else answer[: i + 1] + answer[i:]


def demonstrations(
    entries: Sequence[Mapping[str, Any]], sft: SftConfig
) -> Iterator[list[tuple[list[dict[str, str]], str]]]:
    """One batch of (chat prompt, answer) per step."""
    rng = random.Random(sft.seed)
    for step in range(sft.steps):
        typo_rate = sft.typo_rate if step >= sft.typo_start * sft.steps else 0.0
        batch = []
        for entry in rng.choices(entries, k=sft.batch_size):
            answer = (
                with_typo(entry["answer"], rng) if rng.random() < typo_rate else entry["answer"]
            )
            batch.append((chat_prompt(entry), answer))
        yield batch


def collate(
    batch: list[tuple[list[dict[str, str]], str]], tokenizer: Qwen2Tokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids ``[B, L]``, right-padded, and labels ``[B, L]``, int64.

    Labels are -100 outside the answer and its end token.
    """
    import torch

    prompts = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False)
        for p, _ in batch
    ]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(
        [answer + tokenizer.eos_token for _, answer in batch], add_special_tokens=False
    )["input_ids"]
    length = max(len(p) + len(a) for p, a in zip(prompt_ids, answer_ids, strict=True))
    ids = torch.full((len(batch), length), tokenizer.pad_token_id)
    labels = torch.full((len(batch), length), -100)
    for row, (p, a) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        ids[row, : len(p) + len(a)] = torch.tensor(p + a)
        labels[row, len(p) : len(p) + len(a)] = torch.tensor(a)
    return ids, labels


def learning_rate(step: int, sft: SftConfig) -> float:
    """Linear warm-up, then half a cosine down to 5 %."""
    decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / sft.steps))
    return sft.learning_rate * decay * min(1.0, (step + 1) / sft.warmup_steps)


def _train(
    task: TaskConfig, model_config: ModelConfig, sft: SftConfig, progress: Progress, folder: Path
) -> None:
    import torch
    import torch.nn.functional as F

    tokenizer = build_tokenizer()
    model = build_model(model_config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    entries = generate(task)["sft"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order on every machine
    try:
        for step, batch in enumerate(demonstrations(entries, sft)):
            ids, labels = collate(batch, tokenizer)
            hidden_states = model.model(input_ids=ids).last_hidden_state[:, :-1]
            answer = labels[:, 1:] >= 0
            loss = F.cross_entropy(model.lm_head(hidden_states[answer]), labels[:, 1:][answer])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, sft)
            optimizer.step()
            if step % 10 == 9 or step + 1 == sft.steps:
                progress(step + 1, sft.steps, loss.item())
    finally:
        torch.set_num_threads(threads)
    save(model.eval(), tokenizer, folder)
