# SPDX-License-Identifier: Apache-2.0
"""The KL budget with Megatron in bfloat16: the KL is that of the product in float32, not that of
the rounded logits.
"""

from __future__ import annotations

from typing import Any

import pytest

from capo_verl.engines.kl_probe import ROUNDED
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.half_precision_cases import measured
from tests.engines.megatron.replay_cases import Case
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks
from tests.helpers.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        name: make_tiny_model(
            tmp_path_factory.mktemp(name),
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=name == "tied",
        )
        for name in ("untied", "tied")
    }


def check_exact(ranks: list[dict[str, Any]], reporting: int) -> None:
    """The probe saw the float32 product; what the model's own logits would have said is something
    else.
    """
    assert all(
        rank["recomputes"] and rank["passes"] == 4 and not rank["warnings"] for rank in ranks
    )
    exact, rounded = next((rank["exact"], rank["rounded"]) for rank in ranks if "exact" in rank)
    assert [rank["kl"] for rank in ranks if "kl" in rank] == [
        pytest.approx(exact, rel=1e-4)
    ] * reporting
    assert exact > 1e-7 and abs(rounded / exact - 1) > 2e-3


def check_fallen_back(ranks: list[dict[str, Any]]) -> None:
    """All ranks leave the first step out, then look at the logits as the model made them, and one
    of them says so.
    """
    assert all(not rank["recomputes"] and rank["passes"] == 3 for rank in ranks)
    assert [message for rank in ranks for message in rank["warnings"]] == [ROUNDED]
    rounded = next(rank["rounded"] for rank in ranks if "rounded" in rank)
    assert next(rank["kl"] for rank in ranks if "kl" in rank) == pytest.approx(rounded, rel=1e-4)


CASES = [
    (Case(Layout(tp=2, sp=True)), "untied"),
    (Case(Layout(tp=2, packed=False)), "tied"),
    (Case(Layout(pp=2)), "tied"),
    (Case(Layout(cp=2)), "untied"),
]


@pytest.mark.parametrize(("case", "model"), CASES, ids=str)
def test_logits_are_computed_again_in_float32(case, model, models):
    check_exact(
        run_on_ranks(measured, case.layout.world_size, case, models[model], preload=ENGINE_MODULES),
        reporting=1,
    )


@pytest.mark.parametrize(
    ("layout", "change"), [(Layout(pp=2), "cap"), (Layout(tp=2), "adapter")], ids=str
)
def test_a_model_that_changes_its_logits_is_measured_from_them(layout, change, models):
    check_fallen_back(
        run_on_ranks(
            measured,
            layout.world_size,
            Case(layout),
            models["untied"],
            change,
            preload=ENGINE_MODULES,
        )
    )
