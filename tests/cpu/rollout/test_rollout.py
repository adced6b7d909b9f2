# SPDX-License-Identifier: Apache-2.0
"""The rollout server, its adapter and its registration, without Ray: coroutines called directly."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

import pytest
import torch

from capo_verl.cpu.expert_weights import one_by_one
from capo_verl.cpu.rollout.backend import register
from capo_verl.cpu.rollout.replica import HFReplica, HFServerAdapter, buckets
from capo_verl.cpu.rollout.sampling import SamplingRequest, generate_batch
from capo_verl.cpu.rollout.server import HFServer, check_rollout_config
from tests.helpers.tiny_model import make_tiny_model

PROMPTS = ([10, 20, 30], [40, 50, 60, 70, 80, 90, 11], [12], [5, 6, 7, 8])
GREEDY = {"temperature": 0, "logprobs": True}


@pytest.fixture(scope="module")
def model(tiny_qwen2: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()


def make_config(**overrides: Any):
    from verl.workers.config import RolloutConfig

    return RolloutConfig(
        name="hf", prompt_length=16, response_length=6, tensor_model_parallel_size=1, **overrides
    )


def make_server(
    path: str, load_format: str = "auto", replica_rank: int = 0, **overrides: Any
) -> HFServer:
    from verl.workers.config import HFModelConfig

    return HFServer(
        make_config(load_format=load_format, **overrides), HFModelConfig(path=path), replica_rank
    )


async def ask(server: HFServer, prompts: Any, params: dict[str, Any]) -> list:
    return await asyncio.gather(
        *[
            server.generate(str(i), prompt_ids=list(p), sampling_params=dict(params))
            for i, p in enumerate(prompts)
        ]
    )


class Handle:
    """What an actor handle looks like to the adapter."""

    def __init__(self, server: HFServer) -> None:
        self.server = server

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.server, name)
        return type(
            "Method",
            (),
            {"remote": staticmethod(lambda *args: asyncio.ensure_future(method(*args)))},
        )


def make_adapter(
    server: HFServer | None, path: str, monkeypatch: pytest.MonkeyPatch, rank: int = 0
) -> HFServerAdapter:
    from verl.workers.config import HFModelConfig

    monkeypatch.setenv("RANK", str(rank))
    adapter = HFServerAdapter(make_config(data_parallel_size=2), HFModelConfig(path=path), None)
    adapter.server = server and Handle(server)
    return adapter


def test_requests_with_different_parameters_at_once(tiny_qwen2: str, model) -> None:
    """Training, validation (greedy) and shorter requests share a batch; each is answered as if it
    were alone.
    """
    server = make_server(tiny_qwen2)

    async def run() -> list:
        return await asyncio.gather(
            ask(server, PROMPTS, GREEDY),
            ask(server, PROMPTS[:2], {"temperature": 1.0, "top_k": 1}),
            ask(server, PROMPTS[:1], {**GREEDY, "max_tokens": 2}),
        )

    greedy, top_1, short = asyncio.run(run())
    want = generate_batch(
        model, [SamplingRequest(p, 6, temperature=0, stop_token_ids=[2]) for p in PROMPTS]
    )
    assert [o.token_ids for o in greedy] == [c.token_ids for c in want]
    for output, completion in zip(greedy, want, strict=True):
        assert output.log_probs == pytest.approx(completion.log_probs, abs=1e-5)
    assert [o.token_ids for o in top_1] == [c.token_ids for c in want[:2]]
    assert top_1[0].log_probs is None, "not asked for"
    assert short[0].token_ids == want[0].token_ids[:2]


def test_stop_reason_is_honest(tiny_qwen2: str) -> None:
    server = make_server(tiny_qwen2)
    (free,) = asyncio.run(ask(server, PROMPTS[:1], GREEDY))
    assert free.stop_reason == "length" and len(free.token_ids) == 6
    server = make_server(tiny_qwen2)
    (stopped,) = asyncio.run(
        ask(server, PROMPTS[:1], {**GREEDY, "stop_token_ids": [free.token_ids[0]]})
    )
    assert stopped.stop_reason == "completed" and stopped.token_ids == free.token_ids[:1]


def test_samples_depend_on_the_seed_and_not_on_the_order_of_arrival(tiny_qwen2: str) -> None:
    prompts = [p for p in PROMPTS for _ in range(3)]

    def sample(order: list[int], validated: int = 0, **overrides: Any) -> list[list[list[int]]]:
        server = make_server(tiny_qwen2, max_num_seqs=5, **overrides)

        async def run() -> list:
            await ask(server, prompts[:validated], GREEDY)
            return await ask(server, [prompts[i] for i in order], {"temperature": 1.0})

        outputs = asyncio.run(run())
        groups: dict[tuple, list] = {}
        for i, output in zip(order, outputs, strict=True):
            groups.setdefault(tuple(prompts[i]), []).append(output.token_ids)
        return [sorted(groups[tuple(p)]) for p in PROMPTS]

    straight = list(range(len(prompts)))
    shuffled = random.Random(0).sample(straight, len(straight))
    assert sample(straight) == sample(shuffled) == sample(straight, validated=4)
    assert sample(straight) != sample(straight, seed=7) != sample(straight, replica_rank=1)
    assert len({str(tokens) for tokens in sample(straight)[0]}) == 3, (
        "the samples of a group differ"
    )


def test_unsupported_parameters_are_named(
    tiny_qwen2: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(tiny_qwen2)
    asyncio.run(ask(server, PROMPTS[:1], {"repetition_penalty": 1.0, "stop": None, "min_p": 0.0}))
    for params, named in (
        ({"repetition_penalty": 1.2}, "actor_rollout_ref.rollout.repetition_penalty=1.0"),
        ({"stop": ["\n"]}, "stop"),
        ({"something_new": 3}, "something_new"),
    ):
        with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match=named):
            asyncio.run(ask(server, PROMPTS[:1], params))
        assert "failed in the rollout server" in caplog.text
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.rollout\.repetition_penalty=1\.3"):
        check_rollout_config(make_config(repetition_penalty=1.3))


def test_a_failing_batch_reaches_every_caller_and_the_log(
    tiny_qwen2: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server(tiny_qwen2)

    async def run() -> list:
        results = await asyncio.gather(
            *[
                server.generate(str(i), prompt_ids=[999_999], sampling_params=dict(GREEDY))
                for i in range(2)
            ],
            return_exceptions=True,
        )
        return [*results, *await ask(server, PROMPTS[:1], GREEDY)]

    first, second, after = asyncio.run(run())
    assert isinstance(first, IndexError) and isinstance(second, IndexError)
    assert "request 0 failed" in caplog.text and "request 1 failed" in caplog.text
    assert len(after.token_ids) == 6, "the server lives on"


def test_abort_and_resume(tiny_qwen2: str) -> None:
    server = make_server(tiny_qwen2)

    async def run() -> tuple:
        first = asyncio.ensure_future(ask(server, PROMPTS[:1], GREEDY))
        while not server._queue:
            await asyncio.sleep(0)
        await server.abort_all_requests()
        held = asyncio.ensure_future(ask(server, PROMPTS[:1], GREEDY))
        await asyncio.sleep(0.05)
        assert not held.done()
        await server.resume_generation()
        (aborted,), (resumed,) = await first, await held
        await server.abort_all_requests(reject_request=True)
        (rejected,) = await ask(server, PROMPTS[:1], GREEDY)
        return aborted, resumed, rejected

    aborted, resumed, rejected = asyncio.run(run())
    assert aborted.stop_reason == rejected.stop_reason == "aborted"
    assert resumed.stop_reason == "length" and len(resumed.token_ids) == 6


def test_weights_arrive(tiny_qwen2: str, model, monkeypatch: pytest.MonkeyPatch) -> None:
    server = make_server(tiny_qwen2, load_format="dummy")
    with pytest.raises(RuntimeError, match="before it received weights"):
        asyncio.run(ask(server, PROMPTS[:1], GREEDY))
    server = make_server(tiny_qwen2, load_format="dummy")
    adapter = make_adapter(server, tiny_qwen2, monkeypatch)

    async def run() -> list:
        await adapter.update_weights(iter(model.state_dict().items()), global_steps=4)
        return await ask(server, PROMPTS, GREEDY)

    outputs = asyncio.run(run())
    assert all(
        torch.equal(tensor, server.model.state_dict()[name])
        for name, tensor in model.state_dict().items()
    )
    want = generate_batch(
        model, [SamplingRequest(p, 6, temperature=0, stop_token_ids=[2]) for p in PROMPTS]
    )
    assert [o.token_ids for o in outputs] == [c.token_ids for c in want]
    assert all(o.extra_fields == {"global_steps": 4} for o in outputs)


def test_tied_weights_need_not_be_sent_twice(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.tiny_model import make_tiny_qwen2

    path = make_tiny_qwen2(tmp_path, tie_word_embeddings=True)
    source, server = make_server(path), make_server(path, load_format="dummy")
    weights = {name: tensor.clone() for name, tensor in source.model.named_parameters()}
    assert "lm_head.weight" not in weights
    asyncio.run(make_adapter(server, path, monkeypatch).update_weights(iter(weights.items())))
    assert torch.equal(server.model.lm_head.weight, source.model.lm_head.weight)


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_arrive_stacked_or_one_by_one(
    stacked: bool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FSDP sends them, and as Megatron does."""
    path = make_tiny_model(tmp_path, "qwen3_moe")
    source, server = make_server(path), make_server(path, load_format="dummy")
    weights = dict(source.model.named_parameters())
    if not stacked:
        weights = one_by_one(weights)
        assert weights["model.layers.1.mlp.experts.3.up_proj.weight"].shape == (32, 64)
    asyncio.run(make_adapter(server, path, monkeypatch).update_weights(iter(weights.items())))
    for name, tensor in server.model.named_parameters():
        assert torch.equal(tensor, source.model.get_parameter(name))
    weights.pop(next(name for name in weights if "experts" in name))
    with pytest.raises(ValueError, match="missing from the update, .*layers.0.mlp.experts.0."):
        asyncio.run(make_adapter(server, path, monkeypatch).update_weights(iter(weights.items())))


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_wrong_weights_are_named(
    fault: str, tiny_qwen2: str, model, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(tiny_qwen2, load_format="dummy")
    adapter = make_adapter(server, tiny_qwen2, monkeypatch)
    weights = dict(model.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = weights.pop(name)
    if fault == "unknown":
        weights.update({name: tensor, "model.layers.9.mlp.up_proj.weight": tensor})
        name = "model.layers.9.mlp.up_proj.weight"
    if fault == "shape":
        weights[name] = tensor[:-1]
    drained = iter(weights.items())
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        asyncio.run(adapter.update_weights(drained))
    assert next(drained, None) is None, (
        "the export is collective: it must be drained before the error"
    )


def test_ranks_that_do_not_lead_drain_the_weights(
    tiny_qwen2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = [make_adapter(None, tiny_qwen2, monkeypatch, rank) for rank in range(4)]
    assert [(a.replica_rank, a.is_leader) for a in adapters] == [
        (0, True),
        (0, False),
        (1, True),
        (1, False),
    ]
    weights = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    asyncio.run(adapters[1].update_weights(weights))
    assert next(weights, None) is None


def all_buckets(weights, limit_bytes: int) -> list[dict[str, torch.Tensor]]:
    async def collected():
        return [bucket async for bucket in buckets(weights, limit_bytes)]

    return asyncio.run(collected())


def test_weights_travel_without_the_buffer_they_are_views_of() -> None:
    buffer = torch.arange(1000.0)
    weights = iter([("a", buffer[3:5]), ("b", buffer[10:16].view(2, 3))])
    (bucket,) = all_buckets(weights, limit_bytes=1 << 20)
    assert bucket["a"].tolist() == [3, 4] and bucket["b"].tolist() == [[10, 11, 12], [13, 14, 15]]
    assert [x.untyped_storage().nbytes() for x in bucket.values()] == [8, 24]


def test_buckets() -> None:
    weights = [(str(i), torch.full((4,), float(i), dtype=torch.bfloat16)) for i in range(5)]
    parts = all_buckets(iter(weights), limit_bytes=32)
    assert [list(part) for part in parts] == [["0", "1"], ["2", "3"], ["4"]]
    assert all(
        tensor.dtype == torch.float32 and tensor[0] == int(name)
        for part in parts
        for name, tensor in part.items()
    )


def test_register() -> None:
    from verl.workers.rollout.base import get_rollout_class
    from verl.workers.rollout.replica import get_rollout_replica_class

    register()
    assert get_rollout_replica_class("hf") is HFReplica
    assert get_rollout_class("hf", "async") is HFServerAdapter
