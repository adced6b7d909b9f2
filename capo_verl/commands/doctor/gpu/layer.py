# SPDX-License-Identifier: Apache-2.0
"""The time of an update of a dense decoder, from one of its layers and its LM head."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from capo_verl.commands.measure.clock import measure_seconds
from capo_verl.commands.measure.workload import MODEL_DTYPES
from capo_verl.plugin.checks.model_shape import ModelShape


class Layer(nn.Module):
    """A layer with grouped queries and SwiGLU, without rotary embedding and learned norms."""

    def __init__(self, shape: ModelShape, **where: Any):
        super().__init__()
        self._heads, self._kv_heads, self._head_dim = shape.heads, shape.kv_heads, shape.head_dim
        width = shape.heads * shape.head_dim
        kv_width = shape.kv_heads * shape.head_dim
        self.qkv = nn.Linear(shape.hidden, width + 2 * kv_width, bias=False, **where)
        self.out = nn.Linear(width, shape.hidden, bias=False, **where)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False, **where)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        """``[b, s, H]`` to the same."""
        heads = self.qkv(rms_norm(x, x.shape[-1:])).unflatten(-1, (-1, self._head_dim))
        sizes = (self._heads, self._kv_heads, self._kv_heads)
        q, k, v = heads.transpose(1, 2).split(sizes, 1)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        gate, up = self.gate_up(rms_norm(x, x.shape[-1:])).chunk(2, -1)
        out: Tensor = x + self.down(silu(gate) * up)
        return out


def update_seconds(
    shape: ModelShape, tokens: int, device: torch.device, sequences: int, length: int
) -> float:
    """Seconds of forward and backward pass of a model on ``tokens``, less than those of an update:
    nothing is recomputed, and the optimizer takes no time.

    Args:
        sequences, length: of what is measured; the rest is in proportion.
    """
    where: dict[str, Any] = {"device": device, "dtype": MODEL_DTYPES[device.type]}
    x = torch.randn(sequences, length, shape.hidden, **where).requires_grad_()
    layer = _seconds(Layer(shape, **where), x)
    head = _seconds(nn.Linear(shape.hidden, shape.vocab, bias=False, **where), x)
    return tokens / (sequences * length) * (shape.layers * layer + head)


def _seconds(module: nn.Module, x: Tensor) -> float:
    """Of a forward and a backward pass."""
    grad = torch.ones_like(module(x))

    def call() -> None:
        module(x).backward(grad)
        module.zero_grad()
        x.grad = None

    call()
    measured = measure_seconds(x.device.type, {"both": call}, repeats=10, limit=10.0)
    return statistics.median(measured["both"])
