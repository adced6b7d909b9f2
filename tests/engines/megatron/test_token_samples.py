# SPDX-License-Identifier: Apache-2.0
"""The trainer's token samples through real engines: the same file from every layout, with the
batch's own tokens in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capo_verl.engines.token_samples import FILE
from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.fsdp.capo_cases import train as train_fsdp
from tests.engines.megatron.capo_cases import ADVANTAGES, KNOBS, PROMPTS, RESPONSES, recorded, train
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

LAYOUTS = [
    Layout(tp=2),
    Layout(cp=2),
    Layout(pp=2),
    Layout(packed=False),
    FsdpLayout(),
    FsdpLayout(sp=2),
    FsdpLayout(packed=False),
]


def samples(layout: Any, model: str, folder: Path, steps: int = 2) -> list[dict[str, Any]]:
    # Two mini-batches of one training step: the scheduler does not move. The first is sampled, on
    # every rank.
    knobs = {
        **KNOBS,
        "sample_tokens_every": 2,
        "sample_tokens": 8,
        "sample_tokens_dir": str(folder),
    }
    run = train if isinstance(layout, Layout) else train_fsdp
    run_on_ranks(
        run,
        layout.world_size,
        layout,
        model,
        "capo",
        knobs,
        steps=steps,
        preload=ENGINE_MODULES,
        timeout=100,
    )
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


@pytest.fixture(scope="module")
def one_rank(tiny_qwen2, tmp_path_factory) -> list[dict[str, Any]]:
    return samples(Layout(), tiny_qwen2, tmp_path_factory.mktemp("one"))


def test_tokens_advantages_and_decisions_are_the_batchs(one_rank):
    batch = recorded()
    assert [(s["step"], s["sample"]) for s in one_rank] == [(1, i) for i in range(4)]
    for entry in one_rank:
        i = entry["sample"]
        ids = batch.ids[i].tolist()
        assert (entry["prompt"]["ids"], entry["response"]["ids"]) == (
            ids[: PROMPTS[i]],
            ids[PROMPTS[i] :],
        )
        response, n = entry["response"], RESPONSES[i]
        assert response["advantage"] == pytest.approx([ADVANTAGES[i]] * n)
        assert response["mask"] == [1] * n
        inside = [int(shift < KNOBS["policy_shift_max"]) for shift in response["policy_shift"]]
        assert response["in_trust_region"] == response["weight"] == inside
        assert all(0 < p < 1 for p in response["probability"])
    rejected = sum(entry["response"]["in_trust_region"].count(0) for entry in one_rank)
    assert 0 < rejected < sum(RESPONSES)  # there is something to get wrong


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_writes_the_same(layout, one_rank, tiny_qwen2, tmp_path):
    found = samples(layout, tiny_qwen2, tmp_path)
    assert len(found) == 4  # one process writes
    for entry, expected in zip(found, one_rank, strict=True):
        for name in ("step", "sample", "prompt"):
            assert entry[name] == expected[name]
        for name, values in expected["response"].items():
            if name in ("ids", "mask", "in_trust_region", "text"):
                assert entry["response"][name] == values
            else:
                assert entry["response"][name] == pytest.approx(values, rel=2e-3, abs=1e-9)
