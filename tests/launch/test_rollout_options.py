# SPDX-License-Identifier: Apache-2.0
"""vLLM takes what the launchers, and verl's own server, say of it.

No engine starts. SGLang is left out: its parser (``sglang.srt.server_args`` of 0.5.12) imports
torchvision and kernels that are built for a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

with mock.patch.dict(os.environ):  # vLLM sets variables
    pytest.importorskip("vllm")
import ray
from omegaconf import DictConfig
from transformers import Qwen2Config

from capo_verl.cpu.quickstart.model import build_tokenizer
from capo_verl.launch.dry_run import composing
from tests.launch import launchers

ROLLOUT = "actor_rollout_ref.rollout"
HEADS = 8


@pytest.fixture(scope="module")
def compose():
    with composing() as compose_one:
        yield compose_one


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model without weights, whose heads divide by every launcher's ranks."""
    folder = tmp_path_factory.mktemp("model")
    build_tokenizer().save_pretrained(folder)
    Qwen2Config(
        vocab_size=128, hidden_size=32 * HEADS, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def parse(tmp_path, model, compose, monkeypatch):
    """verl's rollout configuration of a launcher, and vLLM's arguments as verl has them parsed."""
    context = SimpleNamespace(get_job_id=lambda: "01", get_node_id=lambda: "node")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")

    def given(script: str, *arguments: str, **variables):
        _, *overrides = launchers.command_line(
            script, tmp_path, *arguments, INFER_BACKEND="vllm", MODEL_PATH=model, **variables
        )
        config = compose([o for o in overrides if not o.startswith("hydra.")]).actor_rollout_ref
        return config.rollout, engine_arguments(config)

    with mock.patch.dict(os.environ):
        yield given


def engine_arguments(config: DictConfig):
    """vLLM's arguments of an engine.

    Raises:
        SystemExit: for an option that vLLM's parser refuses.
    """
    from verl.workers.rollout.replica import RolloutMode
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer
    from vllm.engine.arg_utils import AsyncEngineArgs

    parsed: list[argparse.Namespace] = []

    class Server(vLLMHttpServer):
        async def run_server(self, args: argparse.Namespace) -> None:
            parsed.append(args)

    ranks = config.rollout.tensor_model_parallel_size
    server = Server(
        config.rollout, config.model, RolloutMode.HYBRID, [None] * ranks, 0, 0, ranks, 1, "0"
    )
    asyncio.run(server.launch_server())
    (arguments,) = parsed
    return AsyncEngineArgs.from_cli_args(arguments)


@pytest.mark.parametrize("script", launchers.GPU)
def test_a_gpu_launcher(parse, script, monkeypatch):
    from vllm.platforms import current_platform

    rollout, arguments = parse(script)
    assert arguments.gpu_memory_utilization == rollout.gpu_memory_utilization == 0.6
    assert arguments.max_model_len == 512 + 1024 and arguments.enable_sleep_mode
    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    engine = arguments.create_engine_config()
    assert engine.parallel_config.tensor_parallel_size == rollout.tensor_model_parallel_size
    assert engine.model_config.enable_sleep_mode and not engine.model_config.enforce_eager


@pytest.mark.parametrize(
    ("script", "length"), [("run_quickstart_cpu.sh", 44), ("run_smollm2_135m_cpu.sh", 144)]
)
def test_a_cpu_launcher(parse, script, length):
    _, arguments = parse(script)
    engine = arguments.create_engine_config()
    assert (str(engine.model_config.dtype), engine.model_config.max_model_len) == (
        "torch.float32", length,
    )  # fmt: skip
    assert not engine.model_config.enable_sleep_mode and engine.model_config.enforce_eager
    assert engine.cache_config.kv_cache_memory_bytes >= 64 << 20
    assert engine.parallel_config.tensor_parallel_size == 2


@pytest.mark.parametrize(
    "option", [f"+{ROLLOUT}.engine_kwargs.vllm.no_such_option=1", f"{ROLLOUT}.logprobs_mode=mine"]
)
def test_an_option_that_vllm_does_not_know(parse, option, capsys):
    with pytest.raises(SystemExit):
        parse("run_qwen3_8b_megatron.sh", option)
    assert option.partition("=")[2] in capsys.readouterr().err
