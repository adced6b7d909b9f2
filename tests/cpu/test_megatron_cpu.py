# SPDX-License-Identifier: Apache-2.0
"""verl's Megatron engine on gloo ranks against Hugging Face: log-probs, entropy, weights, gradients, checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cpu.engine_cases import LENGTHS, Layout, make_engine, measure, next_token_mask, save_and_resume, sequences
from tests.helpers.spawn import RankError, run_on_ranks

PRELOAD = ("torch", "verl.workers.engine.megatron.transformer_impl", "capo_verl.cpu.bridge")
LAYOUTS = [
    Layout(),
    Layout(packed=False),
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(dp=2),
    Layout(cp=2),
    Layout(tp=2, packed=False),
    Layout(pp=2, packed=False),
]
LR, CLIP = 0.5, 1.0


@dataclass
class Reference:
    log_probs: list[torch.Tensor]
    entropy: list[torch.Tensor]
    weights: dict[str, torch.Tensor]
    stepped: dict[str, torch.Tensor]
    grad_norm: float


def make_reference(path: str) -> Reference:
    """The same numbers from Hugging Face and autograd, one sequence at a time, one clipped step of gradient descent."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    log_probs, entropy, total = [], [], 0.0
    for row in sequences():
        log_p = model(row[None]).logits[0].log_softmax(-1)
        log_probs.append(log_p[:-1].gather(-1, row[1:, None])[:, 0])
        entropy.append(-(log_p.exp() * log_p).sum(-1))
        total = total - (log_probs[-1] * next_token_mask(len(row))[:-1]).sum()
    (total / sum(next_token_mask(length).sum() for length in LENGTHS)).backward()
    parameters = dict(model.named_parameters())
    norm = torch.stack([p.grad.norm() for p in parameters.values()]).norm().item()
    scale = LR * min(1.0, CLIP / (norm + 1e-6))
    return Reference(
        [x.detach() for x in log_probs],
        [x.detach() for x in entropy],
        {name: p.detach().clone() for name, p in parameters.items()},
        {name: p.detach() - scale * p.grad for name, p in parameters.items()},
        norm,
    )


@pytest.fixture(scope="module")
def reference(tiny_qwen2: str) -> Reference:
    return make_reference(tiny_qwen2)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def check(ranks: list, layout: Layout, reference: Reference) -> None:
    """Every rank against the reference; the gradient norm is clipped, so the step tests the clipping too."""
    assert reference.grad_norm > CLIP
    outputs = [(rank.log_probs, rank.entropy) for rank in ranks if rank.log_probs]
    assert len(outputs) == layout.dp
    log_probs = [row for rows, _ in outputs for row in rows]
    entropy = [row for _, rows in outputs for row in rows]
    for got, want in zip(log_probs, reference.log_probs, strict=True):
        torch.testing.assert_close(got[:-1], want, rtol=0, atol=1e-5)
    for got, want in zip(entropy, reference.entropy, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    for rank in ranks:
        assert largest_difference(rank.exported, reference.weights) == 0.0, "HF -> Megatron -> HF is not bit-exact"
        assert rank.grad_norm == pytest.approx(reference.grad_norm, rel=1e-5)
        assert largest_difference(rank.stepped, reference.stepped) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matches_hugging_face(layout: Layout, tiny_qwen2: str, reference: Reference) -> None:
    check(run_on_ranks(measure, layout.world_size, layout, tiny_qwen2, preload=PRELOAD), layout, reference)


def test_recomputation_changes_nothing(tiny_qwen2: str, reference: Reference) -> None:
    override = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    layout = Layout(tp=2)
    ranks = run_on_ranks(measure, 2, layout, tiny_qwen2, override_transformer_config=override, preload=PRELOAD)
    check(ranks, layout, reference)


def test_interleaved_pipeline(tmp_path) -> None:
    from tests.helpers.tiny_model import make_tiny_qwen2

    path, layout = make_tiny_qwen2(tmp_path, layers=4), Layout(pp=2, vpp=2)
    ranks = run_on_ranks(measure, 2, layout, path, preload=PRELOAD)
    check(ranks, layout, make_reference(path))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen2-tied"])
def test_other_architectures(model_type: str, tmp_path) -> None:
    from tests.helpers.tiny_model import make_tiny_model

    name, _, tied = model_type.partition("-")
    path = make_tiny_model(tmp_path, name, tie_word_embeddings=bool(tied))
    layout = Layout(pp=2) if tied else Layout(tp=2)
    check(run_on_ranks(measure, layout.world_size, layout, path, preload=PRELOAD), layout, make_reference(path))


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2)], ids=str)
def test_checkpoint(layout: Layout, tiny_qwen2: str, tmp_path) -> None:
    """Loading restores the weights and the optimizer: the step after it repeats the step after saving."""
    ranks = run_on_ranks(save_and_resume, layout.world_size, layout, tiny_qwen2, str(tmp_path), preload=PRELOAD)
    for saved, later, loaded, again in ranks:
        assert largest_difference(saved, later) > 1e-3
        assert largest_difference(saved, loaded) == 0.0
        assert largest_difference(later, again) == 0.0


@pytest.mark.parametrize(
    ("layout", "megatron", "named"),
    [
        (Layout(cp=2, packed=False), {}, "use_remove_padding=True"),
        (Layout(), {"use_fused_kernels": True}, "actor_rollout_ref.model.use_fused_kernels"),
        (Layout(), {"use_megatron_fsdp": True}, "actor_rollout_ref.actor.megatron.use_megatron_fsdp"),
    ],
    ids=["padded-cp", "fused-kernels", "fsdp"],
)
def test_what_a_cpu_cannot_do_is_named(layout: Layout, megatron: dict, named: str, tiny_qwen2: str) -> None:
    with pytest.raises(RankError, match="ValueError") as error:
        run_on_ranks(make_engine, layout.world_size, layout, tiny_qwen2, preload=PRELOAD, **megatron)
    assert named in str(error.value)


def test_rope_scaling_is_refused(tmp_path) -> None:
    from tests.helpers.tiny_model import make_tiny_qwen2

    path = Path(make_tiny_qwen2(tmp_path)) / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    path.write_text(json.dumps(config))
    with pytest.raises(RankError, match="rope_type=linear of the model is not supported on the CPU"):
        run_on_ranks(make_engine, 1, Layout(), str(tmp_path), preload=PRELOAD)
