# SPDX-License-Identifier: Apache-2.0
"""The plan's formulas against numbers worked out by hand, and against what the engine on a CPU
allocates.
"""

from __future__ import annotations

import dataclasses

import pytest

from capo_verl.config import verl_knobs
from capo_verl.launch import plan_memory
from capo_verl.launch.dry_run import compose
from capo_verl.launch.plan import GIB, PlanError, make_plan
from capo_verl.launch.plan_memory import FLOAT32
from capo_verl.plugin.checks.model_shape import KNOWN, find_shape
from capo_verl.plugin.checks.run_spec import RunSpec, from_config
from tests.cpu.megatron.engine_cases import Layout
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks
from tests.helpers.tiny_model import make_tiny_model
from tests.launch.logits_cases import ROWS, TOKENS, peak_bytes
from tests.launch.state_cases import held_bytes

QWEN_7B = KNOWN["qwen/qwen2.5-math-7b"]
RUN = RunSpec(
    gpus_per_node=8, tp=2, prompts=144, completions_per_prompt=8, mini_batch=144,
    tokens_per_gpu=16384, log_prob_tokens_per_gpu=16384, recompute="full", offload_parameters=True,
    offload_optimizer=True, rollout_memory=0.6, capo=verl_knobs("grpo"),
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> dict[str, str]:
    experts = make_tiny_model(tmp_path_factory.mktemp("experts"), "qwen3_moe")
    return {"dense": str(tiny_model), "experts": experts}


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        *(
            (layout, "dense")
            for layout in (
                Layout(),
                Layout(tp=2),
                Layout(pp=2),
                Layout(dp=2),
                Layout(dp=2, distributed_optimizer=True),
            )
        ),
        (Layout(dp=2, ep=2), "experts"),
        (Layout(tp=2, sp=True), "experts"),
        (Layout(tp=2, sp=True, ep=2, etp=1, distributed_optimizer=True), "experts"),
    ],
    ids=str,
)
def test_states_are_what_the_engine_holds(layout, model, models):
    path = models[model]
    run = RunSpec(
        cpu=True, gpus_per_node=layout.world_size, tp=layout.tp, pp=layout.pp, ep=layout.ep,
        etp=layout.etp, distributed_optimizer=layout.distributed_optimizer,
    )  # fmt: skip
    shape = find_shape(path)
    for held in run_on_ranks(held_bytes, layout.world_size, layout, path, preload=ENGINE_MODULES):
        planned = plan_memory.states(run, shape, held["stage"])
        assert held["parameters"] == planned.parameters
        # The distributed optimizer starts every tensor at a multiple of 64 elements, and rounds its
        # buckets up.
        padding = (
            (64 * held["tensors"] + 256 * layout.dp) * 4 if layout.distributed_optimizer else 0
        )
        assert planned.gradients <= held["gradients"] <= planned.gradients + padding
        if layout.distributed_optimizer:
            assert held["optimizer"] == pytest.approx(
                planned.optimizer, rel=0.1
            )  # the cut follows the padded buffer
        else:
            assert held["optimizer"] == planned.optimizer


def test_distributed_optimizer_states_add_up(tiny_model):
    layout = Layout(dp=2, distributed_optimizer=True)
    ranks = run_on_ranks(held_bytes, 2, layout, str(tiny_model), preload=ENGINE_MODULES)
    run = RunSpec(cpu=True, gpus_per_node=2)
    planned = plan_memory.states(run, find_shape(str(tiny_model)), 0).optimizer
    assert sum(held["optimizer"] for held in ranks) == 2 * planned


def test_gpu_states_by_hand():
    """Two bytes for a parameter, four for its gradient, twelve for Adam over the four data-parallel
    ranks.
    """
    held = (7_615_616_512 + (2 * 28 + 1) * 3584) // 2  # norms are on both ranks
    states = plan_memory.states(RUN, QWEN_7B, 0)
    assert (states.parameters, states.gradients, states.optimizer) == (
        2 * held,
        4 * held,
        12 * held / 4,
    )
    whole = plan_memory.states(dataclasses.replace(RUN, distributed_optimizer=False), QWEN_7B, 0)
    assert whole.optimizer == 12 * held


EXPERTS = KNOWN["qwen/qwen3-30b-a3b"]


def test_experts_by_hand():
    """Eight of 16 GPUs hold the experts of a layer once; their optimizer is split over two, all
    else over four.
    """
    run = dataclasses.replace(RUN, nodes=2, tp=4, ep=8, etp=1)
    layer = (32 + 2 * 4 + 32) * 128 * 2048 // 4 + 2 * 2048 + 2 * 128 + 128 * 2048
    dense = 48 * layer + 2 * 151936 // 4 * 2048 + 2048
    experts = 48 * 128 * 3 * 2048 * 768 // 8
    states = plan_memory.states(run, EXPERTS, 0)
    assert (states.parameters, states.gradients) == (2 * (dense + experts), 4 * (dense + experts))
    assert states.optimizer == 12 * (dense / 4 + experts / 2)
    whole = plan_memory.states(dataclasses.replace(run, distributed_optimizer=False), EXPERTS, 0)
    assert whole.optimizer == 12 * (dense + experts)
    attention = 4 * 2048 + (2 * 32 + 2 * 4) * 128
    for etp, of_experts in ((1, 8 * (2 * 2048 + 3 * 768)), (4, 8 * (5 * 2048 + 3 * 768))):
        kept = plan_memory.layer_activations(dataclasses.replace(run, etp=etp), EXPERTS, 1000)
        assert kept == 2 * 1000 * (attention + of_experts) / 4


def test_activations_by_hand():
    tokens, run = 1000, RUN
    layer = 2 * tokens * (4 * 3584 + 2 * 3584 + 2 * 4 * 128 + 3 * 18944) / 2
    assert plan_memory.layer_activations(run, QWEN_7B, tokens) == layer
    assert plan_memory.activations(run, QWEN_7B, tokens, 0) == 28 * 2 * tokens * 3584 / 2 + layer
    kept = dataclasses.replace(run, recompute="none")
    assert plan_memory.activations(kept, QWEN_7B, tokens, 0) == 28 * layer
    # Without sequence parallelism both ranks hold the norms' inputs and outputs whole.
    whole = dataclasses.replace(run, sequence_parallel=False)
    assert (
        plan_memory.layer_activations(whole, QWEN_7B, tokens) == layer + 2 * tokens * 4 * 3584 / 2
    )
    # 1F1B: the first of four stages holds four micro-batches, the last one.
    deep = dataclasses.replace(kept, pp=4)
    assert plan_memory.activations(deep, QWEN_7B, tokens, 0) == 4 * 7 * layer
    assert plan_memory.activations(deep, QWEN_7B, tokens, 3) == 7 * layer


def test_logits_filter_and_cache_by_hand():
    tokens, rows = 1000, 152064 // 2
    fused = dataclasses.replace(RUN, fused_head="triton")
    assert plan_memory.logits(fused, QWEN_7B, tokens, update=True) == tokens * 2 * (9504 + 0)
    assert plan_memory.logits(fused, QWEN_7B, tokens, update=False) == tokens * 3 * 4 * 75
    uneven = dataclasses.replace(QWEN_7B, vocab=2 * (9504 + 100))
    assert plan_memory.logits(fused, uneven, tokens, update=True) == tokens * 2 * (9504 + 100)
    assert plan_memory.capo_filter(RUN, QWEN_7B).moments == 2 * rows * 3584 * 4
    assert plan_memory.capo_filter(dataclasses.replace(RUN, capo=None), QWEN_7B).moments == 0
    assert plan_memory.kv_cache_per_token(RUN, QWEN_7B) == 2 * 28 * 4 * 128 * 2
    assert (
        plan_memory.kv_cache_per_token(dataclasses.replace(RUN, rollout_tp=2), QWEN_7B)
        == 28 * 4 * 128 * 2
    )
    assert (
        plan_memory.kv_cache_per_token(dataclasses.replace(RUN, rollout_tp=7), QWEN_7B)
        == 2 * 28 * 128 * 2
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        # Float32 of a bfloat16 model: their softmax and its gradient; with the entropy three.
        ({}, (8, 12, 12)),
        ({"cpu": True}, (16, 16, 12)),
        # Bfloat16 of FSDP: flash-attention's gradient is written over them.
        ({"engine": "fsdp2", "tp": 1}, (2, 6, 6)),
        ({"engine": "fsdp2", "tp": 1, "temperature": 0.7}, (4, 8, 8)),
        ({"engine": "fsdp2", "tp": 1, "capo": {"policy_penalty": 1.0}}, (6, 6, 6)),
        ({"engine": "fsdp2", "tp": 1, "cpu": True}, (12, 28, 12)),
        ({"engine": "fsdp2", "tp": 1, "cpu": True, "temperature": 0.7}, (12, 28, 16)),
    ],
    ids=str,
)
def test_bytes_per_logit(change, expected):
    run = dataclasses.replace(RUN, **change)
    assert per_logit(run, QWEN_7B, 1000) == expected


ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))
FUSED = f"{MODEL}.use_fused_kernels=True"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model_engine=megatron"], ("", False, 1.0)),
        (["model_engine=megatron", FUSED], ("triton", False, 1.0)),
        (["model_engine=megatron", FUSED, f"{MODEL}.use_remove_padding=False"], ("", False, 1.0)),
        (["model_engine=dp", FUSED], ("torch", False, 1.0)),
        (
            ["model_engine=dp", FUSED, f"{MODEL}.fused_kernel_options.impl_backend=triton"],
            ("triton", False, 1.0),
        ),
        ([f"{ACTOR}.entropy_coeff=0.01"], ("", True, 1.0)),
        ([f"{ACTOR}.calculate_entropy=True"], ("", True, 1.0)),
        ([f"{ROLLOUT}.temperature=0.7"], ("", False, 0.7)),
    ],
    ids=str,
)
def test_what_the_logits_depend_on_is_read(overrides, expected):
    run = from_config(compose([*overrides, f"{ACTOR}.ppo_micro_batch_size_per_gpu=1"]), cpu=False)
    assert (run.fused_head, run.keeps_entropy_graph, run.temperature) == expected


def per_logit(run, shape, tokens):
    """Planned bytes per token and row: update, update with entropy, log-probabilities."""
    entropy = dataclasses.replace(run, keeps_entropy_graph=True)
    planned = (
        plan_memory.logits(run, shape, tokens, update=True),
        plan_memory.logits(entropy, shape, tokens, update=True),
        plan_memory.logits(run, shape, tokens, update=False),
    )
    return tuple(size / (tokens * shape.vocab / run.tp) for size in planned)


COMPILED_AWAY = FLOAT32
"""Bytes per logit of a product in verl's entropy under Megatron: a compiler leaves it out, which
the tests' ranks do without.
"""


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    return make_tiny_model(
        tmp_path_factory.mktemp("wide"), vocab_size=ROWS, hidden_size=16, layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("run", "compiled_away"),
    [
        (RunSpec(), (0, COMPILED_AWAY, COMPILED_AWAY)),
        (RunSpec(cpu=True, temperature=0.7), (0, 0, COMPILED_AWAY)),
        (RunSpec(engine="fsdp", cpu=True), (0, 0, 0)),
        (RunSpec(engine="fsdp2", cpu=True, temperature=0.7), (0, 0, 0)),
        (RunSpec(engine="fsdp", fused_head="torch"), (0, 0, 0)),
        (RunSpec(engine="fsdp2"), None),
        (RunSpec(engine="fsdp2", temperature=0.7), None),
    ],
    ids=["megatron", "megatron-cpu", "fsdp-cpu", "fsdp2-cpu", "fsdp-fused", "fsdp2", "fsdp2-cool"],
)
def test_logits_take_what_is_planned(run, compiled_away, wide_model):
    """Of FSDP on a GPU the update only: its entropy is compiled as a whole."""
    (measured,) = run_on_ranks(peak_bytes, 1, run, wide_model, preload=ENGINE_MODULES)
    found = [size / (TOKENS * ROWS) for size in measured.values()]
    planned = per_logit(run, find_shape(wide_model), TOKENS)
    if compiled_away is None:
        found, planned, compiled_away = found[:1], planned[:1], (0,)
    expected = [sum(pair) for pair in zip(planned, compiled_away, strict=True)]
    assert found == pytest.approx(expected, rel=0.06, abs=0.5)


def test_kl_probe_by_hand():
    """18 of 288 completions a rank, but no more than 256 MiB; a line search copies the float32
    parameters.
    """
    assert plan_memory.kl_probe(RUN, QWEN_7B, 0) == plan_memory.ProbeMemory(0, 0)
    run = dataclasses.replace(RUN, capo=verl_knobs("kl_budget"))
    assert plan_memory.capo_filter(run, QWEN_7B).moments == 0  # mode=off
    probe, rows = plan_memory.kl_probe(run, QWEN_7B, 0), 152064 // 2
    assert 18 * run.response_length * rows * 4 > 256 * 2**20
    assert probe == plan_memory.ProbeMemory(256 * 2**20, 0)
    short = dataclasses.replace(run, response_length=8)
    assert plan_memory.kl_probe(short, QWEN_7B, 0).logits == 18 * 8 * rows * 4
    knobs = {
        **run.capo,
        "kl_budget": {**run.capo["kl_budget"], "estimator": "k3", "line_search": 2.0},
    }
    split = -(-QWEN_7B.parameters(2) // 4)
    assert plan_memory.kl_probe(
        dataclasses.replace(run, capo=knobs), QWEN_7B, 0
    ) == plan_memory.ProbeMemory(0, 4 * split)
    sharded = dataclasses.replace(run, capo=knobs, engine="fsdp2", tp=1)
    assert plan_memory.kl_probe(sharded, QWEN_7B, 0).parameters == 4 * -(-QWEN_7B.parameters() // 8)
    without = make_plan(dataclasses.replace(run, capo=None), QWEN_7B).phases["update"]
    assert make_plan(run, QWEN_7B).phases["update"] == {**without, "KL probe": probe.logits}


def test_micro_batches_are_no_larger_than_the_batch():
    assert plan_memory.tokens_of_micro_batch(RUN) == 16384
    small = dataclasses.replace(RUN, prompts=1, mini_batch=1)
    assert plan_memory.tokens_of_micro_batch(small) == 2 * 1536
    fixed = dataclasses.replace(RUN, tokens_per_gpu=None, micro_batch=3)
    assert plan_memory.tokens_of_micro_batch(fixed) == 3 * 1536
    assert plan_memory.tokens_of_micro_batch(dataclasses.replace(fixed, cp=2)) == 3 * 1536 / 2


def test_phases():
    plan = make_plan(RUN, QWEN_7B)
    update, rollout = plan.phases["update"], plan.phases["rollout"]
    assert sum(rollout.values()) == int(0.6 * 79.6 * GIB)  # nothing of the trainer is left
    assert plan.kv_tokens == (int(0.6 * 79.6 * GIB) - 2 * QWEN_7B.parameters()) // (
        2 * 28 * 4 * 128 * 2
    )
    assert plan.host == 8 * (update["parameters"] + update["optimizer"] + update["CAPO moments"])
    assert plan.phases["log-probs"]["gradients"] == plan.phases["log-probs"]["optimizer"] == 0
    resident = make_plan(
        dataclasses.replace(
            RUN, offload_parameters=False, offload_optimizer=False, rollout_memory=0.35
        ),
        QWEN_7B,
    )
    assert resident.host == 0
    trainer = sum(update[name] for name in ("parameters", "gradients", "optimizer", "CAPO moments"))
    assert sum(resident.phases["rollout"].values()) == trainer + int(0.35 * 79.6 * GIB)
    awake = make_plan(dataclasses.replace(RUN, rollout_sleeps=False, rollout_memory=0.25), QWEN_7B)
    assert sum(awake.phases["update"].values()) == sum(update.values()) + int(0.25 * 79.6 * GIB)


def test_a_run_on_a_cpu():
    """SmolLM2 as its launcher trains it took 9.9 GiB, with vLLM 12.6 (docs/plan.md); its heads are
    12 over 4 there, to divide by two.
    """
    shape = dataclasses.replace(KNOWN["huggingfacetb/smollm2-135m"], heads=12, kv_heads=4)
    run = RunSpec(
        cpu=True, gpus_per_node=2, tp=2, prompts=4, mini_batch=4, completions_per_prompt=8,
        prompt_length=128,
        response_length=16, micro_batch=4, log_prob_micro_batch=4, rollout="hf", rollout_tp=2,
        pads_vocab=False, capo=verl_knobs("grpo"),
    )  # fmt: skip
    (parts,) = make_plan(run, shape, memory=24).phases.values()
    held = 2 * shape.parameters(2)
    assert (parts["parameters"], parts["gradients"], parts["optimizer"]) == (
        4 * held,
        4 * held,
        8 * held,
    )
    assert parts["rollout weights"] == 4 * shape.parameters()
    assert parts["KV cache"] == 32 * 144 * 2 * 30 * 4 * 64 * 4
    assert sum(parts.values()) / GIB == pytest.approx(9.9, rel=0.1)
    with pytest.raises(
        PlanError, match="does not fit: update needs .* GiB per node .* of 8.0: use a smaller model"
    ):
        make_plan(run, shape, memory=8)
    vllm = dataclasses.replace(run, rollout="vllm", kv_cache_bytes=256 << 20)
    (with_vllm,) = make_plan(vllm, shape, memory=24).phases.values()
    # Two ranks: half of each weight, once as it came and once packed.
    assert with_vllm["rollout weights"] == 2 * 2 * 4 * shape.parameters(2)
    assert with_vllm["KV cache"] == 2 * 256 << 20
    assert sum(with_vllm.values()) / GIB == pytest.approx(12.6, rel=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tp": 1}, "does not fit: update needs .* GiB per GPU .*parameters 14.2.* of 73.6: raise "
        "the tensor"),
        ({"rollout_memory": 0.15}, "leaves room for 0 tokens of KV cache .57344 bytes each. beside "
        "14.2 GiB of weights"),
        ({"rollout_memory": 0.95}, "does not fit: rollout needs 75.6 .* lower "
        ".*gpu_memory_utilization=0.95"),
        ({"tp": 8}, "28 attention heads, which do not divide by .*tensor_model_parallel_size=8"),
        ({"response_length": 4096}, "= 4608 tokens are more than the 4096 positions of "
        "Qwen2.5-Math-7B"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_numbers(change, message):
    run = dataclasses.replace(RUN, **change)
    if change == {"tp": 1}:
        run = dataclasses.replace(run, gpus_per_node=1, distributed_optimizer=True)
    with pytest.raises(PlanError, match=message):
        make_plan(run, QWEN_7B)
