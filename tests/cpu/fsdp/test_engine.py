# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine on gloo ranks against Hugging Face: log-probs, entropy, weights, gradients,
LoRA, checkpoints.
"""

from __future__ import annotations

import re

import pytest
import torch

from tests.cpu.fsdp.engine_cases import (
    FsdpLayout,
    forward_fsdp,
    make_fsdp_engine,
    measure_fsdp,
    save_and_resume_fsdp,
    write_adapter,
)
from tests.cpu.hugging_face import Reference, check, check_resumed, make_reference
from tests.helpers.spawn import ENGINE_MODULES, RankError, run_on_ranks

LAYOUTS = [
    *(
        FsdpLayout(strategy, dp, packed)
        for strategy in ("fsdp2", "fsdp")
        for dp in (1, 2)
        for packed in (True, False)
    ),
    *(FsdpLayout(strategy, sp=2) for strategy in ("fsdp2", "fsdp")),
    FsdpLayout("fsdp2", 2, fsdp_size=1),
]
FUSED = [
    *(FsdpLayout("fsdp", dp=2, fused=backend) for backend in ("torch", "triton")),
    *(FsdpLayout("fsdp", sp=2, fused=backend) for backend in ("torch", "triton")),
    FsdpLayout("fsdp", packed=False, fused="torch"),
]
"""Other combinations are refused, see below; of fsdp2 with tied embeddings, see
``test_other_architectures``.
"""


@pytest.fixture(scope="module")
def reference(tiny_qwen2: str) -> Reference:
    return make_reference(tiny_qwen2)


@pytest.mark.parametrize("layout", [*LAYOUTS, *FUSED], ids=str)
def test_matches_hugging_face(layout: FsdpLayout, tiny_qwen2: str, reference: Reference) -> None:
    check(
        run_on_ranks(measure_fsdp, layout.world_size, layout, tiny_qwen2, preload=ENGINE_MODULES),
        layout.dp,
        reference,
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_packed_sequences_do_not_see_each_other(
    attention: str, tiny_qwen2: str, reference: Reference
) -> None:
    model = {"override_config": {"attn_implementation": attention}}
    check(
        run_on_ranks(
            measure_fsdp, 1, FsdpLayout(), tiny_qwen2, model=model, preload=ENGINE_MODULES
        ),
        1,
        reference,
    )


def test_padding_to_a_bucket_changes_nothing(tiny_qwen2: str, reference: Reference) -> None:
    bucket = {"pad_to_length": True, "pad_to_length_bucket": 16}
    check(
        run_on_ranks(measure_fsdp, 1, FsdpLayout(), tiny_qwen2, preload=ENGINE_MODULES, **bucket),
        1,
        reference,
    )


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        *((name, FsdpLayout(dp=2)) for name in ("llama", "qwen3", "qwen3_moe", "qwen2-tied")),
        ("llama", FsdpLayout("fsdp", 2, fused="torch")),
        *(("qwen2-tied", FsdpLayout("fsdp2", 2, fused=backend)) for backend in ("torch", "triton")),
        ("qwen2-tied", FsdpLayout("fsdp2", packed=False, fused="torch")),
        ("qwen2-tied", FsdpLayout("fsdp", sp=2, fused="torch")),
    ],
    ids=str,
)
def test_other_architectures(model_type: str, layout: FsdpLayout, tmp_path) -> None:
    from tests.helpers.tiny_model import make_tiny_model

    name, _, tied = model_type.partition("-")
    path = make_tiny_model(tmp_path, name, tie_word_embeddings=bool(tied))
    reference = make_reference(path)
    ranks = run_on_ranks(measure_fsdp, layout.world_size, layout, path, preload=ENGINE_MODULES)
    if tied:  # exported under both names
        for weights in (w for rank in ranks for w in (rank.exported, rank.stepped)):
            assert torch.equal(weights.pop("lm_head.weight"), weights["model.embed_tokens.weight"])
    check(ranks, layout.dp, reference)


@pytest.mark.parametrize(
    "layout", [FsdpLayout(), *(FsdpLayout(strategy, 2) for strategy in ("fsdp2", "fsdp"))], ids=str
)
def test_lora(layout: FsdpLayout, tiny_qwen2: str, tmp_path) -> None:
    """The adapter is trained, the base is not; the rollout gets their float32 sum."""
    adapter = write_adapter(tiny_qwen2, str(tmp_path))
    reference = make_reference(tiny_qwen2, adapter)
    model = {"lora_rank": 4, "lora_alpha": 8, "lora_adapter_path": adapter}
    ranks = run_on_ranks(
        measure_fsdp, layout.world_size, layout, tiny_qwen2, model=model, preload=ENGINE_MODULES
    )
    check(ranks, layout.dp, reference, exported=1e-6)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp"])
def test_reference_policy(strategy: str, tiny_qwen2: str, reference: Reference) -> None:
    ranks = run_on_ranks(
        forward_fsdp,
        2,
        FsdpLayout(strategy, 2),
        tiny_qwen2,
        forward_only=True,
        preload=ENGINE_MODULES,
    )
    rows = [row for rank in ranks for row in rank["log_probs"]]
    for got, want in zip(rows, reference.log_probs, strict=True):
        torch.testing.assert_close(got[:-1], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "layout",
    [
        FsdpLayout(strategy, dp, lora_rank=lora)
        for strategy in ("fsdp2", "fsdp")
        for dp in (1, 2)
        for lora in (0, 4)
    ],
    ids=str,
)
def test_checkpoint(layout: FsdpLayout, tiny_qwen2: str, tmp_path) -> None:
    """Loading restores the weights and the optimizer: the step after it repeats the step after
    saving.
    """
    ranks = run_on_ranks(
        save_and_resume_fsdp, layout.dp, layout, tiny_qwen2, str(tmp_path), preload=ENGINE_MODULES
    )
    check_resumed(ranks)


@pytest.mark.parametrize(
    ("model", "fsdp", "named"),
    [
        (
            {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "liger"}},
            {},
            "actor_rollout_ref.model.fused_kernel_options.impl_backend=liger is not supported on "
            "the CPU: set it to torch",
        ),
        (
            {"use_fused_kernels": True},
            {},
            "use_fused_kernels=True needs a model with tied embeddings under FSDP2; set "
            "actor_rollout_ref.actor.strategy=fsdp",
        ),
        (
            {"use_liger": True},
            {},
            "actor_rollout_ref.model.use_liger=True is not supported on the CPU: set it to False",
        ),
    ],
    ids=["liger-backend", "untied-fsdp2", "liger"],
)
def test_what_a_cpu_cannot_do_is_named(
    model: dict, fsdp: dict, named: str, tiny_qwen2: str
) -> None:
    with pytest.raises(RankError, match="ValueError") as error:
        run_on_ranks(
            make_fsdp_engine,
            1,
            FsdpLayout(),
            tiny_qwen2,
            model=model,
            preload=ENGINE_MODULES,
            **fsdp,
        )
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("model_type", "packed", "ulysses", "named"),
    [
        ("glm4v", False, 1, "the multi-modal model_type=glm4v is not supported on the CPU: use one "
        "of qwen3_vl, qwen2_5_vl, qwen2_vl, or a text model"),
        ("qwen2_5_vl", True, 1, "in packed batches, which verl runs with flash attention, is not "
        "supported on the CPU: set actor_rollout_ref.model.use_remove_padding=False"),
        ("qwen3_vl", True, 2, "under Ulysses is not supported on the CPU: set actor_rollout_ref."
        "actor.fsdp_config.ulysses_sequence_parallel_size=1"),
    ],
)  # fmt: skip
def test_what_models_that_see_cannot_do_on_a_cpu_is_named(model_type, packed, ulysses, named):
    from types import SimpleNamespace

    from transformers import AutoConfig
    from verl.workers.config import FSDPEngineConfig

    from capo_verl.cpu.fsdp.engine import check_cpu_settings

    model = SimpleNamespace(
        hf_config=AutoConfig.for_model(model_type), use_remove_padding=packed, use_liger=False,
        use_fused_kernels=False, fused_kernel_options={},
    )  # fmt: skip
    engine = FSDPEngineConfig(strategy="fsdp2", ulysses_sequence_parallel_size=ulysses)
    with pytest.raises(ValueError, match=re.escape(named)):
        check_cpu_settings(model, engine)


def test_padded_batches_with_the_triton_backend_are_refused(tiny_qwen2: str) -> None:
    with pytest.raises(
        RankError, match="impl_backend=triton needs packed batches; set .*use_remove_padding=True"
    ):
        run_on_ranks(
            make_fsdp_engine,
            1,
            FsdpLayout("fsdp", packed=False, fused="triton"),
            tiny_qwen2,
            preload=ENGINE_MODULES,
        )
