# SPDX-License-Identifier: Apache-2.0
"""The state of a KL budget in checkpoints, both engines: resumed bit-exactly, refused if damaged,
missed with a warning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.kl_cases import knobs_of, load_control, resumed
from tests.engines.megatron.replay_cases import Case
from tests.engines.megatron.state_cases import resume, save_and_go_on
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks
from tests.helpers.tiny_model import make_tiny_model

FILTER: dict[str, Any] = {"mode": "filter", "top_k": 20, "objective_shift_max": None}


def on_ranks(function, case: Any, *args):
    layout = case.layout if isinstance(case, Case) else case
    return run_on_ranks(
        function, layout.world_size, case, *args, preload=ENGINE_MODULES, timeout=300
    )


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory) -> str:
    return make_tiny_model(
        tmp_path_factory.mktemp("four-layers"),
        layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


@pytest.mark.parametrize(
    ("case", "knobs"),
    [
        (Case(Layout(tp=2)), knobs_of(line_search=1.2, rate_min=0.3)),
        (Case(Layout(dp=2, distributed_optimizer=True)), knobs_of(line_search=1.2, rate_min=0.3)),
        # The first rank writes, and here it holds no LM head.
        (
            Case(Layout(pp=2)),
            {
                **knobs_of(rate_min=1.0, rate_max=1.0),
                **FILTER,
                "policy_shift_max": {"target_rejection": 0.2},
            },
        ),
        (FsdpLayout("fsdp", 2), knobs_of(line_search=1.2, rate_min=0.3)),
    ],
    ids=["tp2", "dist-opt", "pp2-adaptive", "fsdp-dp2"],
)
def test_resuming_continues_bit_exactly(case, knobs, four_layers, tmp_path):
    path = str(tmp_path / "checkpoint")
    ranks = on_ranks(resumed, case, four_layers, path, knobs)
    saved = json.loads(Path(path, "capo", "control.json").read_text())
    assert saved["kl_budget"]["measured"] == 1 and saved["moments"] == (knobs["mode"] != "off")
    assert bool(saved["filter"]) == (knobs["mode"] != "off")
    assert any(rank["resumed"]["report"] for rank in ranks)
    for a, b in ((rank["uninterrupted"], rank["resumed"]) for rank in ranks):
        assert a["report"] == b["report"] and a["state"] == b["state"]
        assert a["state"]["curvature"] != saved["kl_budget"]["curvature"]
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


def test_damaged_files_are_refused_on_every_rank(four_layers, tmp_path):
    from capo_verl.engines.checkpoint_files import Control, _sum

    payload = Control(False, {"scale": 0.5}, {})._asdict()
    text = json.dumps({"version": 1, **payload, "sha256": _sum(payload)})
    damaged = {
        "whole": (text, "Control(moments=False, kl_budget={'scale': 0.5}, filter={})"),
        "cut": (text[:-20], "JSONDecodeError"),
        "changed": (text.replace("0.5", "0.6"), "its checksum does not fit"),
        "newer": (text.replace('"version": 1', '"version": 2'), "it is of another version than 1"),
        "empty": ("{}", "KeyError"),
    }
    for name, (content, _) in damaged.items():
        (tmp_path / name / "capo").mkdir(parents=True)
        (tmp_path / name / "capo" / "control.json").write_text(content)
    (tmp_path / "none").mkdir()
    paths = [str(tmp_path / name) for name in (*damaged, "none")]
    for said in on_ranks(load_control, Case(Layout(tp=2)), four_layers, paths):
        assert said.pop() == "None"
        for name, (_, expected), message in zip(damaged, damaged.values(), said, strict=True):
            assert expected in message
            assert (
                name == "whole"
                or f"the CAPO state in {tmp_path}/{name}/capo/control.json cannot be used"
                in message
            )


@pytest.mark.parametrize("layout", [Layout(), FsdpLayout()], ids=str)
def test_runs_with_and_without_a_budget_take_over_from_each_other(layout, four_layers, tmp_path):
    """A checkpoint without its state is a fresh start with a warning; one without moments is none
    of a filter's.
    """
    filtered, controlled = str(tmp_path / "filtered"), str(tmp_path / "controlled")
    plain = {**FILTER, "policy_shift_max": 9e-2}
    on_ranks(save_and_go_on, layout, four_layers, filtered, plain)
    assert not Path(
        filtered, "capo", "control.json"
    ).exists()  # nothing to say: as before there was a budget
    (later,) = on_ranks(
        resume, layout, four_layers, filtered, {**plain, **knobs_of(), "mode": "filter"}
    )
    assert f"the checkpoint {filtered} holds no state of a KL budget" in later["said"]
    assert later["metrics"]["capo/lr"] == [1e-7] and later["moments"]["step"] == 3

    on_ranks(save_and_go_on, layout, four_layers, controlled, knobs_of())
    assert [p.name for p in Path(controlled, "capo").iterdir()] == ["control.json"]
    (later,) = on_ranks(resume, layout, four_layers, controlled, plain)
    assert (
        f"the checkpoint {controlled} was written without CAPO: its moments start empty"
        in later["said"]
    )
    assert later["moments"]["step"] == 1
