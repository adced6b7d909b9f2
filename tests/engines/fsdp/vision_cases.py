# SPDX-License-Identifier: Apache-2.0
"""A tiny vision-language model and a batch with images, on one rank of the FSDP engine: what
``test_vision.py`` runs on gloo ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import export
from tests.engines.fsdp.capo_cases import make
from tests.engines.megatron.capo_cases import STEPS, make_loss, moments, recorded, to_verl
from tests.helpers.recording import RecordedBatch
from tests.helpers.tiny_model import build_tokenizer

IMAGE, START, END = 120, 121, 122
PATCH = {"patch_size": 4, "temporal_patch_size": 1, "in_channels": 3}
GRIDS = ([(1, 4, 4)], [], [(1, 2, 4), (1, 4, 2)], [(1, 2, 2)])
"""Images of each sequence, in patches; four patches are one token of the language model. The second
sequence has none.
"""


def make_tiny_vl(path: Path, model_type: str) -> str:
    """Write a random vision-language model and its tokenizer to ``path``, and return it."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokenizer = build_tokenizer(128)
    qwen3 = model_type == "qwen3_vl"
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    config = AutoConfig.for_model(
        model_type,
        text_config={
            "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16, "max_position_embeddings": 512, "attention_dropout": 0.0,
            "rope_parameters": rope | ({"mrope_interleaved": True} if qwen3 else {}),
            "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **PATCH, "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "spatial_merge_size": 2, "out_hidden_size": 64,
            **({"num_position_embeddings": 16, "deepstack_visual_indexes": [0]} if qwen3
               else {"window_size": 16, "fullatt_block_indexes": [1]}),
        },
        image_token_id=IMAGE, video_token_id=123, vision_start_token_id=START,
        vision_end_token_id=END, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.05 * noise if "norm" in name and "weight" in name
                            else 0.08 * noise)  # fmt: skip
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def batch_with_images() -> tuple[RecordedBatch, list[dict[str, torch.Tensor]]]:
    """The recorded batch with images before its prompts, and the model's arguments for each
    sequence.
    """
    text, generator = recorded(), torch.Generator().manual_seed(5)
    pixels = PATCH["in_channels"] * PATCH["patch_size"] ** 2 * PATCH["temporal_patch_size"]
    ids, prompts, images = [], [], []
    for row, prompt, grids in zip(text.ids, text.prompts, GRIDS, strict=True):
        seen = [[START, *[IMAGE] * (t * h * w // 4), END] for t, h, w in grids]
        before = torch.tensor([i for image in seen for i in image], dtype=torch.int64)
        ids.append(torch.cat((before, row)))
        prompts.append(prompt + len(before))
        patches = sum(t * h * w for t, h, w in grids)
        images.append(
            {
                "pixel_values": torch.randn(patches, pixels, generator=generator),
                "image_grid_thw": torch.tensor(grids),
            }
            if grids
            else {}
        )
    text.ids, text.prompts = ids, tuple(prompts)
    return text, images


def arguments(batch: RecordedBatch, images: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """The arguments of Hugging Face's own forward pass: it makes the positions itself."""
    return [
        {**seen, "mm_token_type_ids": (ids == IMAGE).int()[None]} if seen else {}
        for ids, seen in zip(batch.ids, images, strict=True)
    ]


def positions(model: Any, ids: torch.Tensor, seen: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the text, and in time, height and width: ``[4, s]``, as verl's agent loop makes them."""
    text = torch.arange(len(ids))
    if not seen:
        return text.expand(4, -1).clone()
    of_vision, _ = model.get_rope_index(
        ids[None], (ids == IMAGE).int()[None], image_grid_thw=seen["image_grid_thw"]
    )
    return torch.cat((text[None], of_vision[:, 0]))


def train(layout: FsdpLayout, model_path: str, knobs: dict[str, Any]) -> dict[str, Any]:
    from tensordict import NonTensorData, NonTensorStack
    from verl.utils.tensordict_utils import maybe_fix_3d_position_ids

    engine = make(layout, model_path)
    batch, images = batch_with_images()
    model = getattr(engine.module, "_fsdp_wrapped_module", engine.module).model
    rows = [positions(model, ids, seen) for ids, seen in zip(batch.ids, images, strict=True)]
    dp, rank = engine.get_data_parallel_size(), engine.get_data_parallel_rank()
    mine = range(rank * 4 // dp, (rank + 1) * 4 // dp)
    loss, reports = make_loss("capo", knobs), []
    with engine.train_mode():
        for _ in range(STEPS):
            data = to_verl(batch, mine, 1.0, {
                "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2,
                "use_remove_padding": layout.packed, "use_fused_kernels": False,
            })  # fmt: skip
            data["position_ids"] = torch.nested.as_nested_tensor(
                [rows[i] for i in mine], layout=torch.jagged
            )
            maybe_fix_3d_position_ids(data)
            data["multi_modal_inputs"] = NonTensorStack(*[NonTensorData(images[i]) for i in mine])
            output = engine.train_batch(data, loss)
            reports.append({"loss": sum(output["loss"]), **output["metrics"]})
    return {"reports": reports, "weights": export(engine), "state": moments(engine)}
