# SPDX-License-Identifier: Apache-2.0
"""One step of an engine against Hugging Face and autograd: the numbers, and the comparison."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

from capo_verl.cpu.expert_weights import one_by_one
from tests.cpu.megatron.engine_cases import LENGTHS, Measured, next_token_mask, sequences

LR, CLIP = 0.5, 1.0


@dataclass
class Reference:
    log_probs: list[torch.Tensor]
    entropy: list[torch.Tensor]
    weights: dict[str, torch.Tensor]
    stepped: dict[str, torch.Tensor]
    grad_norm: float


def make_reference(path: str, adapter: str | None = None) -> Reference:
    """The same numbers from Hugging Face and autograd, one sequence at a time, one clipped step of
    gradient descent.

    Args:
        adapter: directory of a LoRA adapter, which is trained in place of the model; the weights
            are the merged ones.
    """
    model = load_model(path, adapter)
    weights = merged_weights(model)
    log_probs, entropy, total = [], [], 0.0
    for row in sequences():
        log_p = model(row[None]).logits[0].log_softmax(-1)
        log_probs.append(log_p[:-1].gather(-1, row[1:, None])[:, 0])
        entropy.append(-(log_p.exp() * log_p).sum(-1))
        total = total - (log_probs[-1] * next_token_mask(len(row))[:-1]).sum()
    (total / sum(next_token_mask(length).sum() for length in LENGTHS)).backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    norm = torch.stack([p.grad.norm() for p in parameters]).norm().item()
    with torch.no_grad():
        for p in parameters:
            p -= LR * min(1.0, CLIP / (norm + 1e-6)) * p.grad
    return Reference(
        [x.detach() for x in log_probs],
        [x.detach() for x in entropy],
        weights,
        merged_weights(model),
        norm,
    )


def load_model(path: str, adapter: str | None) -> torch.nn.Module:
    """Hugging Face's model in float32, trainable; with the LoRA adapter in that directory only the
    adapter is.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    sees = hasattr(AutoConfig.from_pretrained(path), "vision_config")
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def merged_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy under Hugging Face's names, adapters merged."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    return one_by_one({name: p.detach().clone() for name, p in model.named_parameters()})


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def check(ranks: list[Measured], dp: int, reference: Reference, exported: float = 0.0) -> None:
    """Every rank against the reference; the gradient norm is clipped, so the step tests the
    clipping too.

    Args:
        exported: tolerance of the weights before the step, bit-exact unless something is added to
            them.
    """
    assert reference.grad_norm > CLIP
    outputs = [(rank.log_probs, rank.entropy) for rank in ranks if rank.log_probs]
    assert len(outputs) == dp
    log_probs = [row for rows, _ in outputs for row in rows]
    entropy = [row for _, rows in outputs for row in rows]
    for got, want in zip(log_probs, reference.log_probs, strict=True):
        torch.testing.assert_close(got[:-1], want, rtol=0, atol=1e-5)
    for got, want in zip(entropy, reference.entropy, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for rank in ranks:
        assert largest_difference(rank.exported, reference.weights) <= exported, (
            "HF -> engine -> HF is not exact"
        )
        assert rank.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
        assert largest_difference(rank.stepped, reference.stepped) < 1e-5


def check_resumed(ranks: list) -> None:
    """Of ``save_and_resume_engine``: loading restores weights and optimizer, so the step after it
    is the one after saving.
    """
    for saved, later, *resumed in ranks:
        assert largest_difference(saved, later) > 1e-3
        for loaded, again in (resumed[:2], resumed[2:]):
            assert largest_difference(saved, loaded) == 0.0
            assert largest_difference(later, again) == 0.0
