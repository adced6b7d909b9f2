# SPDX-License-Identifier: Apache-2.0
"""CAPO on a vision-language model under verl's FSDP engine, against Hugging Face + the filter in
float64: images in the prompts, positions in three dimensions.
"""

from __future__ import annotations

import pytest

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.engines.fsdp.vision_cases import arguments, batch_with_images, make_tiny_vl, train
from tests.engines.megatron.capo_cases import KNOBS
from tests.engines.megatron.capo_reference import check_training, make_reference
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks


@pytest.mark.parametrize(
    ("model_type", "layout"),
    [
        ("qwen3_vl", FsdpLayout()),
        ("qwen3_vl", FsdpLayout("fsdp", dp=2, packed=False)),
        ("qwen2_5_vl", FsdpLayout(packed=False)),
    ],
    ids=str,
)
def test_training_with_images_equals_hugging_face_with_the_float64_filter(
    model_type, layout, tmp_path
):
    path = make_tiny_vl(tmp_path / model_type, model_type)
    batch, images = batch_with_images()
    reference = make_reference(path, 1.0, batch=batch, images=arguments(batch, images))
    ranks = run_on_ranks(train, layout.world_size, layout, path, KNOBS, preload=ENGINE_MODULES)
    check_training(ranks, layout.dp, reference)


def test_the_kl_of_a_step_with_images_is_the_same_packed_and_padded(tmp_path):
    path = make_tiny_vl(tmp_path / "model", "qwen3_vl")
    knobs = {**KNOBS, "mode": "off", "kl_budget": {"delta": 1e-3, "probe_share": 1.0}}
    packed, padded = (
        run_on_ranks(train, 1, FsdpLayout(packed=packed), path, knobs, preload=ENGINE_MODULES)[0]
        for packed in (True, False)
    )
    for a, b in zip(packed["reports"], padded["reports"], strict=True):
        assert a["capo/kl_mean"][0] > 0
        assert a["capo/kl_mean"] == pytest.approx(b["capo/kl_mean"], rel=1e-2)
