# SPDX-License-Identifier: Apache-2.0
"""CAPO inside verl's Megatron engine on gloo ranks: switch, tracking, losses, padding of the
vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.cpu.megatron.engine_cases import Layout
from tests.engines.megatron.capo_cases import KNOBS, train
from tests.engines.megatron.capo_reference import (
    check_meaningful,
    check_training,
    check_untouched,
    make_reference,
)
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
def test_training_equals_the_reference_that_fsdp_is_held_to(layout, tiny_qwen2):
    reference = make_reference(tiny_qwen2, temperature=1.0)
    check_meaningful(reference)
    check_training(
        run_on_ranks(
            train, layout.world_size, layout, tiny_qwen2, "capo", KNOBS, preload=ENGINE_MODULES
        ),
        layout.dp,
        reference,
    )


def test_padding_of_the_vocabulary_is_never_in_the_support(odd_vocabulary):
    """Megatron's own softmax counts the padded row, so only the first step's decisions can be
    compared.
    """
    everything = {**KNOBS, "top_k": None}
    one, two = (
        run_on_ranks(
            train,
            layout.world_size,
            layout,
            odd_vocabulary,
            "capo",
            everything,
            steps=1,
            preload=ENGINE_MODULES,
        )
        for layout in (Layout(), Layout(tp=2))
    )
    a, b = one[0]["reports"][0], two[0]["reports"][0]
    assert a["capo/accepted_tokens"] == b["capo/accepted_tokens"] and a["capo/outside_support"] == [
        0.0
    ]
    for name in (
        "policy_shift_mean",
        "policy_shift_max",
        "objective_shift_p50",
        "batch_policy_shift_before",
    ):
        assert a[f"capo/{name}"][0] == pytest.approx(b[f"capo/{name}"][0], rel=1e-4)
    assert two[1]["state"]["exp_avg"].shape[0] == 63 and not two[1]["state"]["exp_avg"][-1].any()
    assert two[1]["state"]["exp_avg"][-2].any()


@pytest.mark.parametrize("layout", [Layout(tp=2, packed=False)], ids=str)
def test_without_the_switch_it_is_verls_engine_bit_for_bit(layout, tiny_qwen2):
    ours, verls = (
        run_on_ranks(
            train,
            layout.world_size,
            layout,
            tiny_qwen2,
            "vanilla",
            None,
            own_engine=own,
            preload=ENGINE_MODULES,
        )
        for own in (True, False)
    )
    check_untouched(ours, verls)


def test_tracking_trains_bit_for_bit_like_no_switch_and_measures(tiny_qwen2):
    layout = Layout(tp=2, packed=False)
    tracked, plain = (
        run_on_ranks(train, 2, layout, tiny_qwen2, "vanilla", knobs, preload=ENGINE_MODULES)
        for knobs in ({**KNOBS, "mode": "track"}, None)
    )
    for a, b in zip(tracked, plain, strict=True):
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    assert all(0 < report["capo/rejection_rate"][0] <= 1 for report in tracked[0]["reports"])


def test_every_loss_of_verl_composes_with_the_filter(tiny_qwen2):
    """One step with each registered loss: finite, and different from the unfiltered loss.

    Then a step with no token left.
    """
    results = run_on_ranks(_every_loss, 1, tiny_qwen2, preload=ENGINE_MODULES, timeout=400)[0]
    assert {
        "vanilla",
        "gspo",
        "cispo",
        "sapo",
        "gpg",
        "clip_cov",
        "kl_cov",
        "dppo_tv",
        "dppo_kl",
        "geo_mean",
        "capo",
    } <= set(results)
    for name, (filtered, plain, emptied, norm_emptied) in results.items():
        assert math.isfinite(filtered), name
        # The filter need not touch the fifth of the tokens that entropy_mask looks at. The values
        # of gtpo's and pacs's losses are -A, equal for these tokens.
        assert abs(filtered - plain) > 1e-6 or name in ("entropy_mask", "gtpo", "pacs"), name
        assert emptied == 0.0 and norm_emptied == 0.0, name


def _every_loss(path: str) -> dict[str, tuple[float, float, float, float]]:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    nothing = {**KNOBS, "policy_shift_max": 1e-30}
    results = {}
    for name in sorted(
        set(POLICY_LOSS_REGISTRY) - {"bypass_mode", "dro"}
    ):  # refused; needs a coefficient of its own
        filtered, plain, emptied = (
            train(Layout(), path, name, knobs, steps=1)["reports"][0]
            for knobs in (KNOBS, None, nothing)
        )
        assert emptied["capo/nothing_accepted"] == [1.0]
        results[name] = (
            filtered["loss"],
            plain["loss"],
            emptied["loss"],
            float(emptied["grad_norm"]),
        )
    return results
