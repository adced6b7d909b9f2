# SPDX-License-Identifier: Apache-2.0
"""CAPO in TRL: a GRPOTrainer whose loss sees the accepted tokens only, and a run of it on a CPU.

python examples/outside_verl/trl_grpo.py --steps 20
"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import ProjectedLogits
from capo_verl.core.metrics import StepMetrics


class CapoGRPOTrainer(GRPOTrainer):
    """GRPOTrainer, and ``capo``: CAPO's knobs. ``betas`` and ``eps`` are those of the trainer's
    optimizer.

    Raises:
        ValueError: for what cannot work, when the trainer is made or before its first step; it says
            what to change.
    """

    def __init__(self, *args: Any, capo: CapoConfig, **kwargs: Any):
        super().__init__(*args, **kwargs)
        refuse(self, capo)
        self.head = self.model.get_output_embeddings()
        ranks = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        self.capo = CapoFilter(
            capo, *self.head.weight.shape, device=self.accelerator.device, dp_group=ranks
        )
        self.capo.keep_for_batch_shifts = False
        self.capo_metrics = StepMetrics(ranks)
        self.forward_pass: Any = None
        self.add_callback(AfterOptimizerStep(self))

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        length, kept = ids.size(1), []
        backbone = self.accelerator.unwrap_model(model).base_model
        with backbone.register_forward_hook(
            lambda module, args, output: kept.append(output.last_hidden_state)
        ):
            self.forward_pass = super()._get_per_token_logps_and_entropies(
                model, torch.cat([inputs["prompt_ids"], ids], dim=1),
                torch.cat([inputs["prompt_mask"], mask], dim=1),
                length, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled,
            )  # fmt: skip
        mask = mask * inputs.get("tool_mask", 1)
        group = head_group(self)
        if "betas" in group:
            self.capo.set_optimizer(group["betas"], group["eps"])
        advantages = inputs["advantages"].view(len(ids), -1).expand(ids.shape)
        sequences = torch.arange(len(ids), device=ids.device)[:, None].expand(ids.shape)
        decision = self.capo.evaluate(
            kept[0][:, -length - 1 : -1], ProjectedLogits(self.head.weight, self.head.bias), ids,
            advantages, mask,
            group["lr"], temperature=torch.full(ids.shape, self.temperature, device=ids.device),
            skip_masked=True,
        )  # fmt: skip
        self.capo_metrics.add(decision, advantages, mask, sequences, len(ids))
        # TRL multiplies `tool_mask` into the mask of its loss, and uses it for nothing else there.
        return super()._compute_loss(model, {**inputs, "tool_mask": mask * decision.accepted})

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """The loss asks for the forward pass that has just been made."""
        made, self.forward_pass = self.forward_pass, None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs) if made is None else made

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = os.path.join(
                self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}"
            )
            torch.save(
                [self.capo.state_dict(), self.capo.adaptive_state()],
                os.path.join(folder, "capo.pt"),
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            moments, adaptive = torch.load(os.path.join(checkpoint, "capo.pt"), weights_only=True)
            self.capo.load_state_dict(moments)
            self.capo.load_adaptive_state(adaptive)


class AfterOptimizerStep(TrainerCallback):
    """Moves the filter on once per optimizer step, and hands its metrics to TRL's log."""

    def __init__(self, trainer: CapoGRPOTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        for name, value in trainer.capo_metrics.compute(trainer.capo.adaptive_metrics()).items():
            trainer._metrics["train"][name].append(value)
        trainer.capo_metrics = StepMetrics(trainer.capo.dp_group)
        # A gradient scaler leaves out steps whose gradients overflow in float16.
        skipped = trainer.accelerator.optimizer_step_was_skipped
        trainer.capo.discard() if skipped else trainer.capo.step()


def head_group(trainer: CapoGRPOTrainer) -> dict[str, Any]:
    """The optimizer's parameter group of the LM head; its ``lr`` is that of the coming step: the
    scheduler moves after a step.
    """
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    expected = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[
        trainer.capo.config.optimizer_model
    ]
    if not isinstance(optimizer, expected):
        raise ValueError(
            f"capo.optimizer_model={trainer.capo.config.optimizer_model} does not model "
            f"{type(optimizer).__name__}; set optim to adamw_torch (or adamw_torch_fused) with "
            "optimizer_model=adam, or to sgd with optimizer_model=sgd"
        )
    for group in optimizer.param_groups:
        if any(parameter is trainer.head.weight for parameter in group["params"]):
            if group.get("momentum") or group.get("amsgrad"):
                raise ValueError(
                    "CAPO models Adam without amsgrad and SGD without momentum; switch them off"
                )
            return group
    raise ValueError(
        "CAPO models the step of the LM head, which the optimizer does not train; unfreeze it"
    )


def refuse(trainer: GRPOTrainer, capo: CapoConfig) -> None:
    """
    Raises:
        ValueError: for what CapoGRPOTrainer cannot do.
    """
    for name in (
        "weighting", "policy_penalty", "objective_penalty", "kl_budget", "on_nonfinite",
        "track_every", "sample_tokens_every",
    ):  # fmt: skip
        value, default = getattr(capo, name), getattr(CapoConfig, name)
        if value != default:
            raise ValueError(
                f"capo.{name}={value!r} is not implemented for TRL; leave it at {default!r}"
            )
    config = trainer.model.config.get_text_config()
    for name in (
        "final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier",
        "logits_scaling"
    ):  # fmt: skip
        if getattr(config, name, None) not in (None, 1):
            raise ValueError(
                f"The model's {name}={getattr(config, name)} changes what comes out of its LM "
                "head, which CAPO would not see; use a model without it"
            )
    for refused, instead in (
        (trainer._is_vlm, "images are not passed on; use a text model"),
        (
            is_peft_model(trainer.model),
            "adapters leave the LM head as it is; train the model itself",
        ),
        (
            trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
            "it needs the whole LM head on each rank; use DDP",
        ),
    ):
        if refused:
            raise ValueError(f"CapoGRPOTrainer: {instead}")


def tiny_policy(words: int = 32) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A random model, and a tokenizer whose words are the numbers 1 to ``words - 1``; nothing is
    downloaded.
    """
    vocabulary = {"<end>": 0} | {str(number): number for number in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    return model, PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"
    )


def upward(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Share of eight tokens that are larger than the one before."""
    sequences = [[int(p.split()[-1]), *ids] for p, ids in zip(prompts, completion_ids, strict=True)]
    return [sum(b > a for a, b in zip(s, s[1:], strict=False)) / 8 for s in sequences]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="CAPO in TRL's GRPOTrainer, with a small random model on a CPU"
    )
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # more of them only wait for each other on a model this small
    model, tokenizer = tiny_policy()
    prompts = [" ".join(str(1 + (i * k) % 7) for k in range(1, 2 + i % 3)) for i in range(64)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = CapoGRPOTrainer(
            model,
            upward,
            GRPOConfig(
                output_dir=folder, per_device_train_batch_size=64, gradient_accumulation_steps=2,
                num_generations=8, max_completion_length=8, temperature=1.2, learning_rate=3e-3,
                lr_scheduler_type="constant", max_steps=steps,
                logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, bf16=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
            capo=CapoConfig(top_k=8, policy_shift_max=2e-2, objective_shift_max=0.3),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(
            f"step {entry['step']:3d}  reward {entry['reward']:.3f}  rejected "
            f"{entry['capo/rejection_rate']:.3f}  m_F {entry['capo/policy_shift_mean']:.2e}"
        )


if __name__ == "__main__":
    main()
