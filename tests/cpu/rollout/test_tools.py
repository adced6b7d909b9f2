# SPDX-License-Identifier: Apache-2.0
"""verl's agent loop with tools on the rollout server: turns, masks and log-probabilities."""

from __future__ import annotations

import asyncio
import json
from itertools import groupby
from typing import Any

import pytest
import torch
import verl  # noqa: F401  plugins first
from hydra import compose, initialize_config_module

from tests.cpu.rollout.test_rollout import make_server


def calculator(expression: str) -> str:
    """Adds two digits.

    Args:
        expression: a digit, a plus sign, a digit.
    """
    a, b = expression.split("+")
    return f"={int(a) + int(b)}"


@pytest.fixture
def agent_loop(tiny_qwen2):
    """Makes verl's loop on a server of a random policy, which writes no JSON: its first two digits
    are a call of the calculator.
    """
    from transformers import AutoTokenizer
    from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap
    from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
    from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser
    from verl.tools.function_tool import FUNCTION_TOOL_REGISTRY, function_tool
    from verl.utils.dataset.rl_dataset import RLHFDataset

    @ToolParser.register("two_digits")
    class TwoDigits(ToolParser):
        async def extract_tool_calls(self, responses_ids: list[int], tools: Any = None) -> Any:
            text = self.tokenizer.decode(responses_ids)
            digits = [c for c in text if c.isdigit()][:2]
            call = json.dumps({"expression": "+".join(digits)})
            found = [FunctionCall(name="calculator", arguments=call)]
            return text, found if len(digits) == 2 else []

    function_tool(calculator)
    tool = FUNCTION_TOOL_REGISTRY.pop("calculator")
    rollout = "actor_rollout_ref.rollout"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[
            f"{rollout}.prompt_length=16", f"{rollout}.response_length=60",
            f"{rollout}.multi_turn.enable=True", f"{rollout}.multi_turn.format=two_digits",
            f"{rollout}.multi_turn.max_assistant_turns=3",
        ])  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    server = make_server(tiny_qwen2)

    def make() -> Any:
        return ToolAgentLoop(
            DictConfigWrap(config), server, tokenizer, None, RLHFDataset,
            DictConfigWrap(config.data), hf_model_type="qwen2", tools=ToolListWrap([tool]),
        )  # fmt: skip

    yield make, tokenizer, server.model
    del ToolParser._registry["two_digits"]


def test_a_tool_speaks_between_the_policys_turns(agent_loop, monkeypatch):
    make, tokenizer, model = agent_loop

    async def run() -> list[Any]:
        loop = make()
        generate = loop.server_manager.generate

        async def text_only(request_id: str, **asked: Any) -> Any:
            del asked["mm_processor_output"]  # of SGLang
            asked["sampling_params"] = {**asked["sampling_params"], "max_tokens": 16}
            return await generate(request_id, **asked)

        monkeypatch.setattr(loop.server_manager, "generate", text_only)
        params = {"temperature": 1.0, "logprobs": True}
        messages = [{"role": "user", "content": "1+1="}]
        return [await loop.run(params, raw_prompt=messages) for _ in range(8)]

    outputs = asyncio.run(run())
    spoke = [output for output in outputs if 0 in output.response_mask]
    assert spoke
    for output in spoke:
        ids = torch.tensor([*output.prompt_ids, *output.response_ids])
        with torch.no_grad():
            of_model = model(ids[None]).logits[0].log_softmax(-1)
        of_model = of_model[:-1].gather(-1, ids[1:, None])[len(output.prompt_ids) - 1 :, 0]
        mask = torch.tensor(output.response_mask).bool()
        log_probs = torch.tensor(output.response_logprobs)
        torch.testing.assert_close(log_probs[mask], of_model[mask], rtol=0, atol=1e-5)
        assert not log_probs[~mask].any()
        turns = [
            (own, tokenizer.decode([id_ for _, id_ in tokens]))
            for own, tokens in groupby(
                zip(output.response_mask, output.response_ids, strict=True), lambda pair: pair[0]
            )
        ]
        assert turns[0][0] == 1 and len(turns) >= 3
        digits = [c for c in turns[0][1] if c.isdigit()]
        assert f"t\n={int(digits[0]) + int(digits[1])}" in turns[1][1]
