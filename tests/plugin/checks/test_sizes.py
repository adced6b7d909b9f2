# SPDX-License-Identifier: Apache-2.0
"""Which sizes are refused, and that those which the stack accepts are not."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hydra import compose, initialize_config_module
from transformers import LlamaConfig

from capo_verl.plugin import bridge
from capo_verl.plugin.checks import sizes
from capo_verl.plugin.checks.model_shape import KNOWN
from capo_verl.plugin.checks.run_spec import RunSpec
from capo_verl.plugin.checks.sizes import MEGATRON, check_sizes, problems

SHAPE = KNOWN["qwen/qwen2.5-math-7b"]  # 28 layers, 28 heads, 4 key-value heads, 152,064 rows
RUN = RunSpec(
    gpus_per_node=8,
    tp=2,
    prompts=16,
    completions_per_prompt=8,
    mini_batch=16,
    micro_batch=4,
    log_prob_micro_batch=4,
)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tp": 4},
        {"pp": 4},
        {"pp": 2, "vpp": 7},
        {"cp": 4},
        {"pp": 8, "tp": 1, "uneven_stages": True},
        {"rollout_tp": 4},
        {"rollout_tp": 3, "rollout": "hf", "colocated": False},
        {
            "nodes": 2,
            "rollout_tp": 14,
            "gpus_per_node": 7,
            "tp": 1,
            "mini_batch": 14,
            "prompts": 14,
            "rollout": "hf",
        },
        {"micro_batch": None, "log_prob_micro_batch": None, "tokens_per_gpu": 4096},
        {
            "micro_batch": None,
            "log_prob_micro_batch": None,
            "tokens_per_gpu": 1536,
            "log_prob_tokens_per_gpu": 1536,
        },
        {"micro_batch": None, "log_prob_micro_batch": None, "tokens_per_gpu": 384, "cp": 4},
        {"engine": "fsdp2", "tp": 1},
        {"prompts": 17},  # verl pads the batch
        {
            "prompts": 15,
            "micro_batch": None,
            "log_prob_micro_batch": None,
            "tokens_per_gpu": 4096,
        },
        {"mini_batch": 3, "dynamic_cp": True},
        {"tokens_per_gpu": 16, "dynamic_cp": True},
    ],
    ids=str,
)
def test_accepted(change):
    assert problems(dataclasses.replace(RUN, **change), SHAPE) == []


EXPERTS = KNOWN["qwen/qwen3-30b-a3b"]  # 128 experts of 768 rows


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ep": 4}, None),
        ({"ep": 8, "etp": 1}, None),
        ({"pp": 2, "ep": 4, "etp": 1}, None),
        ({"etp": 1, "megatron_bridge": True}, None),
        ({"ep": 8}, "= 8 GPUs do not divide by .*: expert_tensor_parallel_size=2 x "
         "expert_model_parallel_size=8 x pipeline_model_parallel_size=1 = 16: change one"),
        ({"gpus_per_node": 6, "ep": 3, "mini_batch": 6},
         "128 experts, which do not divide by .*expert_model_parallel_size=3: choose another"),
        ({"gpus_per_node": 10, "tp": 1, "etp": 5, "ep": 2, "mini_batch": 10, "micro_batch": 1,
          "log_prob_micro_batch": 1, "megatron_bridge": True},
         "768 rows of an expert, which do not divide by .*expert_tensor_parallel_size=5: choose"),
        ({"sequence_parallel": False}, "tensor_model_parallel_size=2 and sequence_parallel=False: "
         "set .*sequence_parallel=True"),
        ({"etp": 1}, "expert_tensor_parallel_size=1 with tensor_model_parallel_size=2 and "
         "expert_model_parallel_size=1: mbridge does not export such experts; set "),
        ({"tp": 1, "etp": 2, "ep": 2}, "mbridge does not export such experts"),
        ({"ep": 0}, "expert_model_parallel_size=0: set it to a positive integer"),
    ],
    ids=str,
)  # fmt: skip
def test_experts(change, expected):
    found = problems(dataclasses.replace(RUN, **change), EXPERTS)
    assert (found == []) if expected is None else re.search(expected, "\n".join(found)), found


def test_a_dense_model_has_no_experts_to_spread():
    assert problems(dataclasses.replace(RUN, ep=2), SHAPE) == [
        "Qwen2.5-Math-7B has no experts, but "
        "actor_rollout_ref.actor.megatron.expert_model_parallel_size=2: set it to 1"
    ]


def test_everything_that_does_not_divide_is_named():
    """Seven divides the GPUs, the heads and, padded, the vocabulary, but neither the feed-forward
    rows nor the groups.
    """
    run = dataclasses.replace(
        RUN, tp=7, gpus_per_node=7, rollout_tp=7, mini_batch=7, pads_vocab=True
    )
    assert problems(run, SHAPE) == [
        "Qwen2.5-Math-7B has 18944 rows of the feed-forward layer, which do not divide by "
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=7: choose another",
        "Qwen2.5-Math-7B has 4 key-value heads, neither a multiple nor a divisor of "
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=7: choose another",
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tp": 3}, "= 8 GPUs do not divide by .*tensor_model_parallel_size=3 x .* = 3: change"),
        ({"nodes": 3, "pp": 7}, "trainer.nnodes=3 x trainer.n_gpus_per_node=8 = 24 GPUs do not "
        "divide by .* = 14"),
        ({"tp": 8}, "28 attention heads, which do not divide by .*=8: choose another"),
        ({"pp": 8, "tp": 1, "mini_batch": 8}, "28 layers, which do not divide by "
        ".*pipeline_model_parallel_size=8"),
        ({"pp": 2, "vpp": 3}, "28 layers, .*=2 x virtual_pipeline_model_parallel_size=3"),
        ({"tp": 1, "rollout_tp": 8}, "28 attention heads, which do not divide by "
        ".*rollout.tensor_model_parallel_size=8"),
        ({"rollout_tp": 3}, "8 GPUs do not divide by .*rollout: tensor_model_parallel_size=3"),
        ({"nodes": 3, "rollout_tp": 12, "rollout": "hf", "mini_batch": 12}, "a replica of 12 GPUs "
        "does not fill whole nodes"),
        ({"mini_batch": 5, "completions_per_prompt": 1}, "=5 x .*n=1 = 5 completions do not divide "
        "by the data-parallel size 4"),
        ({"prompts": 15}, "data.train_batch_size=15 prompts are less than one "
        ".*ppo_mini_batch_size=16: lower ppo_mini_batch_size"),
        ({"micro_batch": 5}, "on 4 data-parallel ranks are 32 each, "
        ".*ppo_micro_batch_size_per_gpu=5"),
        ({"log_prob_micro_batch": 5}, "are 32 each, .*log_prob_micro_batch_size_per_gpu=5"),
        ({"max_model_len": 5000}, "max_model_len=5000 is more than the 4096 positions"),
        ({"tp": 0}, "tensor_model_parallel_size=0: set it to a positive integer"),
        ({"tokens_per_gpu": 1535}, "=512 .*=1024 = 1536 tokens are more "
        ".*ppo_max_token_len_per_gpu=1535: .* least 1536"),
        ({"log_prob_tokens_per_gpu": 383, "cp": 4}, "log_prob_max_token_len_per_gpu=383 x 4 "
        "context-.*: .* least 384"),
        ({"engine": "fsdp2", "cp": 3},
            "8 GPUs do not divide by .*ulysses_sequence_parallel_size=3"),
    ],
    ids=str,
)  # fmt: skip
def test_refused_with_the_numbers(change, expected):
    found = problems(dataclasses.replace(RUN, **change), SHAPE)
    assert re.search(expected, found[0]) and "\n" not in found[0]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("prompts", [100, 255, 256, 300])
def test_a_mini_batch_of_more_than_the_batch_is_refused_where_verl_refuses_it(prompts, dynamic):
    from verl.workers.config import ActorConfig, OptimizerConfig

    actor = ActorConfig(
        strategy="fsdp", rollout_n=8, ppo_mini_batch_size=256, ppo_micro_batch_size_per_gpu=4,
        use_dynamic_bsz=dynamic, optim=OptimizerConfig(lr=1e-6),
    )  # fmt: skip
    try:
        actor.validate(n_gpus=8, train_batch_size=prompts)
        refused = False
    except ValueError as error:
        refused = f"train_batch_size ({prompts}) must be >= " in str(error)
    micro = {"micro_batch": None, "tokens_per_gpu": 4096} if dynamic else {}
    run = dataclasses.replace(RUN, prompts=prompts, mini_batch=256, **micro)
    assert any("are less than one" in problem for problem in problems(run, SHAPE)) == refused
    assert refused == (prompts < 256 and not dynamic)


def test_the_vocabulary_is_split_evenly_where_nobody_pads_it():
    odd = dataclasses.replace(SHAPE, vocab=151_001)
    assert problems(dataclasses.replace(RUN, pads_vocab=True), odd) == []
    assert problems(RUN, odd) == [
        "Qwen2.5-Math-7B has 151001 rows of the vocabulary, which do not divide by "
        "actor_rollout_ref.actor.megatron.tensor_model_parallel_size=2: choose another, or let "
        "Megatron-Bridge (vanilla_mbridge=False) pad them with "
        "+actor_rollout_ref.actor.megatron.override_transformer_config.should_pad_vocab=True"
    ]


def test_megatron_bridge_cannot_load_tied_embeddings_into_virtual_stages():
    tied = KNOWN["qwen/qwen2.5-math-1.5b"]
    run = dataclasses.replace(RUN, tp=1, pp=2, vpp=7, megatron_bridge=True)
    assert problems(run, tied) == [
        "Qwen2.5-Math-1.5B ties its embeddings, which Megatron-Bridge 0.5 cannot load with "
        "actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size=7: set it to null, "
        "or actor_rollout_ref.actor.megatron.vanilla_mbridge=True"
    ]
    for change in ({"megatron_bridge": False}, {"vpp": 1}):
        assert problems(dataclasses.replace(run, **change), tied) == []
    assert problems(run, SHAPE) == []


@pytest.fixture(scope="module")
def command_line(tmp_path_factory):
    """verl's configuration for a model with so many rows, on two GPUs that share it."""
    with initialize_config_module("verl.trainer.config", version_base=None):

        def composed(vocab, *overrides):
            folder = tmp_path_factory.mktemp("model")
            model = LlamaConfig(
                vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2,
            )  # fmt: skip
            model.save_pretrained(folder)
            return compose("ppo_trainer", overrides=[
                "model_engine=megatron", "trainer.n_gpus_per_node=2",
                "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
                f"{MEGATRON}.tensor_model_parallel_size=2",
                f"actor_rollout_ref.model.path={folder}", *overrides,
            ])  # fmt: skip

        yield composed


VANILLA = f"{MEGATRON}.vanilla_mbridge=True"
PADDED = f"+{MEGATRON}.override_transformer_config.should_pad_vocab"


@pytest.mark.parametrize(
    ("vocab", "overrides"),
    [
        (126, []),
        (126, [VANILLA]),
        (126, [f"{PADDED}=False"]),
        (125, [f"{PADDED}=True"]),
        (125, [f"{MEGATRON}.tensor_model_parallel_size=1"]),
    ],
)
def test_a_vocabulary_that_divides_or_is_padded_is_accepted(
    command_line, monkeypatch, vocab, overrides
):
    monkeypatch.setattr(sizes, "on_cpu", lambda: False)
    check_sizes(command_line(vocab, *overrides))


@pytest.mark.parametrize(
    "overrides", [[], [f"{PADDED}=False"], [VANILLA], [VANILLA, f"{PADDED}=True"]], ids=str
)
def test_a_vocabulary_that_nobody_pads_is_refused_before_the_start(
    command_line, monkeypatch, overrides
):
    monkeypatch.setattr(sizes, "on_cpu", lambda: False)
    expected = rf"has 125 rows of the vocabulary, .*size=2: .* with {re.escape(PADDED)}=True$"
    with pytest.raises(ValueError, match=expected):
        check_sizes(command_line(125, *overrides))


def test_mbridge_pads_nothing_on_cpus(command_line, monkeypatch):
    monkeypatch.setattr(sizes, "lacking", lambda: "megatron.bridge")
    monkeypatch.setattr(bridge, "lacking", lambda: "megatron.bridge")
    with pytest.raises(ValueError, match="has 125 rows of the vocabulary, .*: choose another$"):
        check_sizes(command_line(125, f"{PADDED}=True"))


def test_megatron_bridge_pads_on_cpus_too(command_line, monkeypatch):
    monkeypatch.setattr(sizes, "lacking", lambda: "")
    monkeypatch.setattr(bridge, "lacking", lambda: "")
    check_sizes(command_line(125, f"{PADDED}=True"))
    with pytest.raises(ValueError, match=rf"has 125 rows .* with {re.escape(PADDED)}=True$"):
        check_sizes(command_line(125))


@pytest.mark.parametrize("vocab", [125, 126])
def test_megatron_embeds_what_is_accepted_here(vocab):
    """The size that the refusal foresees is the one that Megatron asserts."""
    from megatron.core.tensor_parallel.utils import VocabUtility

    refused = problems(RUN, dataclasses.replace(SHAPE, vocab=vocab))
    try:
        VocabUtility.vocab_range_from_global_vocab_size(vocab, 0, world_size=2)
    except AssertionError:
        assert refused and vocab == 125
    else:
        assert not refused and vocab == 126


def test_megatron_core_agrees():
    """Its own refusals of heads, groups and stages, for the sizes refused here."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    def config(tp=1, pp=1, **more):
        return TransformerConfig(
            num_layers=28, hidden_size=3584, num_attention_heads=28, num_query_groups=4,
            kv_channels=128, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
            pipeline_dtype="float32", **more,
        )  # fmt: skip

    config(tp=4, pp=4)
    for tp in (8, 7):  # the heads; the groups
        with pytest.raises(ValueError, match="num_attention_heads|num_query_groups"):
            config(tp=tp)
    assert get_num_layers_to_build(config(pp=4), pp_rank=0) == 7
    with pytest.raises(
        AssertionError, match="num_layers.* should be divisible by .*pipeline_model_parallel_size"
    ):
        get_num_layers_to_build(config(pp=8), pp_rank=0)
