# SPDX-License-Identifier: Apache-2.0
"""LoRA under Megatron, through Megatron-Bridge: the filter sees the true input of the LM head and
decides as float64 does, and runs resume bit-exactly.
"""

from __future__ import annotations

import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from capo_verl.plugin.bridge import lacking
from tests.cpu.hugging_face import load_model
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.capo_cases import ADVANTAGES, KNOBS, LR, PROMPTS, recorded
from tests.engines.megatron.lora_cases import interrupted, train
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

pytestmark = pytest.mark.skipif(
    bool(lacking()),
    reason="Megatron-Bridge needs Python 3.12 and Megatron-Core 0.17: scripts/test_gpu_stack.sh",
)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
def test_decisions_are_those_of_float64(layout, tiny_qwen2):
    """Of the model that Hugging Face makes of the merged weights, and a filter of its own."""
    ranks = run_on_ranks(
        train, layout.world_size, layout, tiny_qwen2, preload=ENGINE_MODULES, timeout=400
    )
    steps = ranks[-1]  # which holds the LM head
    model = load_model(tiny_qwen2, None).double()
    capo = CapoFilter(CapoConfig(**KNOBS), model.config.vocab_size, model.config.hidden_size)
    batch = recorded()
    start = dict(model.named_parameters())
    assert all(torch.equal(start[n].float(), w) for n, w in steps[0]["weights"].items())
    rejected = 0
    for step in steps:
        model.load_state_dict({n: w.double() for n, w in step["weights"].items()})
        hidden_states, accepted, shifts = [], [], []
        for i, row in enumerate(batch.ids):
            hidden = model.model(row[None]).last_hidden_state[:, PROMPTS[i] - 1 : -1].detach()
            actions = row[None, PROMPTS[i] :]
            out = capo.evaluate(
                hidden, model.lm_head(hidden).detach(), actions, torch.tensor([[ADVANTAGES[i]]]),
                torch.ones_like(actions), LR,
            )  # fmt: skip
            hidden_states.append(hidden[0])
            accepted.append(out.accepted[0])
            shifts.append(out.policy_shift[0])
        capo.step()
        torch.testing.assert_close(
            step["hidden_states"].double(), torch.cat(hidden_states), rtol=0, atol=1e-4
        )
        torch.testing.assert_close(
            step["policy_shift"].double(), torch.cat(shifts), rtol=1e-4, atol=1e-9
        )
        assert torch.equal(step["accepted"].bool(), torch.cat(accepted).bool())
        rejected += int((~torch.cat(accepted).bool()).sum())
    assert rejected and not torch.equal(
        steps[0]["weights"]["model.layers.0.self_attn.q_proj.weight"],
        steps[1]["weights"]["model.layers.0.self_attn.q_proj.weight"],
    )


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_resuming_continues_bit_exactly(merge, tiny_qwen2, tmp_path):
    layout = Layout(tp=2, sp=True, distributed_optimizer=True)
    for saved, resumed in run_on_ranks(
        interrupted, 2, layout, tiny_qwen2, str(tmp_path / "checkpoint"), merge,
        preload=ENGINE_MODULES, timeout=400,
    ):  # fmt: skip
        assert saved[0] == resumed[0]
        assert saved[1] and all(torch.equal(x, resumed[1][n]) for n, x in saved[1].items())
        assert saved[2]["step"] == resumed[2]["step"] == 3
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(saved[2][name], resumed[2][name])
