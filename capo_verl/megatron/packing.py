# SPDX-License-Identifier: Apache-2.0
"""From verl's response-only fields to the layout in which Megatron computes the logits.

verl's batches hold prompts and responses of different lengths without padding. The model sees either one packed row
(``thd``) or padded rows (``bshd``), of which a context-parallel rank holds a slice. Labels are shifted by one there: the
position of a token's logits is that of its predecessor. The same functions which lay out the labels lay out our fields.
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor
from verl.models.mcore.util import postprocess_thd_engine, preprocess_bshd_engine, preprocess_thd_engine
from verl.utils import tensordict_utils as tu

from capo_verl.response import SAMPLE, PackedResponse, max_response_tokens, response_fields


def pack_response(batch: TensorDict, data_format: str, layout: dict[str, Any]) -> PackedResponse:
    """Lay out advantages and response mask like the labels.

    Args:
        batch: micro-batch, see :func:`capo_verl.response.response_fields`.
        data_format: ``thd`` or ``bshd``.
        layout: from :func:`label_layout`.
    """
    preprocess = preprocess_thd_engine if data_format == "thd" else preprocess_bshd_engine
    packed = preprocess(response_fields(batch), pre_process=True, need_roll=True, **layout)[0]
    advantages, mask, sequence = packed.unbind(-1)
    return PackedResponse(
        advantages.contiguous(), mask > 0.5, sequence.long(), batch[SAMPLE], max_response_tokens(batch)
    )


def unpack(values: Tensor, batch: TensorDict, layout: dict[str, Any]) -> Tensor:
    """``[1, total]``, this context-parallel rank's part of packed per-token results, to nested ``[b, j]`` like ``input_ids``."""
    input_ids = batch["input_ids"]
    packed_seq_params = preprocess_thd_engine(input_ids, pre_process=False, **layout)[1]
    cp_layout = {"cp_layout": layout["cp_layout"]}
    return postprocess_thd_engine(values, packed_seq_params, input_ids, len(batch), **cp_layout)


def label_layout(engine: Any, batch: TensorDict, data_format: str, unwrapped_model: Any) -> dict[str, Any]:
    """The arguments with which verl's engine lays out the labels of this micro-batch (``MegatronEngine.forward_step``)."""
    fp8 = unwrapped_model.config.fp8 in ("e4m3", "hybrid")
    if data_format == "bshd":
        forced = tu.get_non_tensor_data(data=batch, key="forced_max_seqlen", default=None)
        return {"use_fp8_padding": fp8, "forced_max_seqlen": forced}
    config = engine.engine_config
    transformer = unwrapped_model.config
    windowed = getattr(transformer, "experimental_attention_variant", None) == "dsv4_hybrid"
    bucket = config.pad_to_length_bucket if config.pad_to_length and config.use_remove_padding else None
    return {
        "use_fp8_padding": fp8,
        "pad_to_length_bucket": bucket,
        # Only the fused forward pass pads to it (``verl/models/mcore/model_forward_fused.py:279``).
        "min_local_rows": transformer.csa_window_size if config.use_fused_kernels and windowed else None,
        "cp_layout": engine._get_context_parallel_layout(unwrapped_model),
    }
