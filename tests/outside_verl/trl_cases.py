# SPDX-License-Identifier: Apache-2.0
"""Small runs of the example for TRL, with every call of its loss on record."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig

from capo_verl import CapoConfig, CapoFilter

_SPEC = importlib.util.spec_from_file_location(
    "trl_grpo_example", Path(__file__).parents[2] / "examples/outside_verl/trl_grpo.py"
)
example = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(example)

KNOBS = {"top_k": 8, "policy_shift_max": 8e-3, "objective_shift_max": 0.1}
ADAM = {"betas": (0.9, 0.95), "eps": 1e-7}
OPTIONS = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "temperature": 1.2,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "linear",
    "adam_beta2": ADAM["betas"][1],
    "adam_epsilon": ADAM["eps"],
    "max_steps": 4,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def make_trainer(
    folder: Path, trainer_class: type | None = None, *, capo: Any = KNOBS, **options: Any
) -> Any:
    """A trainer of the small model; ``capo=None`` makes TRL's own."""
    model, tokenizer = example.tiny_policy()
    prompts = [" ".join(str(1 + (i * k) % 7) for k in range(1, 2 + i % 3)) for i in range(32)]
    dataset = Dataset.from_dict({"prompt": prompts})
    trainer = (trainer_class or example.CapoGRPOTrainer)(
        model,
        example.upward,
        GRPOConfig(output_dir=str(folder), **{**OPTIONS, **options}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        **({} if capo is None else {"capo": CapoConfig(**capo)}),
    )
    trainer.remove_callback(example.PrinterCallback)
    return trainer


@dataclass
class Call:
    """One micro-batch: what the loss was computed from, and what came out."""

    inputs: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    loss: torch.Tensor
    gradients: list[torch.Tensor]


class Recorded(example.CapoGRPOTrainer):
    """Keeps every call of the loss.

    With ``tool_masks`` some tokens are said to come from a tool.
    """

    tool_masks = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.calls: list[Call] = []

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        if self.tool_masks:
            output["tool_mask"] = (output["completion_ids"] % 3 > 0).long()
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        weights = deepcopy(self.model.state_dict())
        loss = super()._compute_loss(model, inputs)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True)
        self.calls.append(Call(inputs, weights, loss.detach(), list(gradients)))
        return loss


def on_two_ranks(folder: str) -> dict[str, Any]:
    """Train with DDP; compare the filter with one that sees the tokens of both ranks.

    Returns:
        The moments of the trainer's filter, those of the other, and what was logged.
    """
    trainer = make_trainer(Path(folder), Recorded, max_steps=3, gradient_accumulation_steps=1)
    evaluate, seen = trainer.capo.evaluate, []

    def recorded(hidden: torch.Tensor, logits: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(
            ({"hidden": hidden.detach(), "weight": logits.weight.detach().clone()}, args, kwargs)
        )
        return evaluate(hidden, logits, *args, **kwargs)

    trainer.capo.evaluate = recorded
    trainer.train()
    whole = CapoFilter(CapoConfig(**KNOBS, **ADAM), *trainer.head.weight.shape)
    for step in seen:
        ranks: list[Any] = [None, None]
        torch.distributed.all_gather_object(ranks, step)
        for tensors, args, kwargs in ranks:
            logits = torch.nn.functional.linear(tensors["hidden"], tensors["weight"])
            whole.evaluate(tensors["hidden"], logits, *args, **kwargs)
        whole.step()
    return {
        "moments": trainer.capo.state_dict(),
        "expected": whole.state_dict(),
        "logged": [entry["capo/rejection_rate"] for entry in trainer.state.log_history[:-1]],
        "tokens": [int(call.inputs["completion_mask"].sum()) for call in trainer.calls],
    }
