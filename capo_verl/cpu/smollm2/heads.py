# SPDX-License-Identifier: Apache-2.0
"""Attention heads that divide by the number of tensor-parallel ranks, without changing the model.

A group of query heads and its key-value head are added with all weights zero, in the columns of the
output projection too. Their values are zero, so they add nothing to the residual stream; and no
gradient reaches them: not the columns, whose input is zero, nor the rows, whose output is
multiplied by zero columns. An optimizer that leaves a weight at zero while its gradient is zero
(Adam, SGD, with or without weight decay) keeps them zero. Function, gradients and training are
those of the original model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = ("llama", "qwen2", "qwen3")


def pad_attention_heads(model: PreTrainedModel, multiple: int) -> PreTrainedModel:
    """An equivalent model whose number of key-value heads is a multiple of ``multiple``.

    The number of query heads per key-value head and the size of a head stay as they are.

    Args:
        model: a dense decoder of Hugging Face, one of :data:`ARCHITECTURES`.
        multiple: usually the tensor-parallel size.

    Returns:
        A new model with its own weights; ``model`` itself if there is nothing to do.

    Raises:
        ValueError: for another architecture, or a multiple below 1. Hugging Face's Llama also wants
            ``hidden_size`` to be a multiple of the new number of heads, and raises its own error if
            it is not.
    """
    config = copy.deepcopy(model.config)
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"model_type={config.model_type}: heads can be added to {', '.join(ARCHITECTURES)}"
        )
    if multiple < 1:
        raise ValueError(f"multiple={multiple}: the tensor-parallel size is at least 1")
    extra = -config.num_key_value_heads % multiple
    if extra == 0:
        return model
    group = config.num_attention_heads // config.num_key_value_heads
    # Its default is hidden_size / heads, which the new heads would change.
    config.head_dim = (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    config.num_attention_heads += group * extra
    config.num_key_value_heads += extra

    key_value, query = extra * config.head_dim, group * extra * config.head_dim
    added = {"q_proj": query, "k_proj": key_value, "v_proj": key_value}
    weights = {}
    for name, tensor in model.state_dict().items():
        *_, projection, kind = name.rsplit(".", 2)
        if projection in added:
            tensor = pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, added[projection]))
        elif (projection, kind) == ("o_proj", "weight"):
            tensor = pad(tensor, (0, query))
        weights[name] = tensor.clone()  # loading takes the tensors themselves
    return type(model).from_pretrained(None, config=config, state_dict=weights, dtype=model.dtype)
