# SPDX-License-Identifier: Apache-2.0
"""Where the hidden states are picked up: at the LM head itself, whatever is wrapped around it."""

from __future__ import annotations

import pytest
import torch
import verl  # noqa: F401  plugins first
from torch import nn

from capo_verl.engines.lm_head import HiddenStatesTap


class Adapter(nn.Module):
    """As Megatron-Bridge wraps a layer for LoRA: the original under ``to_wrap``, its attributes not
    passed on.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.to_wrap, self.down, self.up = layer, nn.Linear(4, 2), nn.Linear(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_wrap(x) + self.up(self.down(x))


class Model(nn.Module):
    def __init__(self, lora: bool):
        super().__init__()
        head = nn.Linear(4, 8)
        head.output_size_per_partition = 8
        self.body, self.output_layer = nn.Linear(4, 4), Adapter(head) if lora else head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output_layer(self.body(x))


@pytest.mark.parametrize("lora", [False, True])
def test_the_input_of_the_lm_head_is_kept_with_and_without_an_adapter(lora):
    from capo_verl.engines.megatron.engine import output_layer_of

    model = Model(lora)
    head = output_layer_of(model)
    assert head.output_size_per_partition == 8
    tap, x = HiddenStatesTap(head), torch.randn(3, 4)
    model(x)
    with pytest.raises(
        RuntimeError, match="without calling its LM head; set .*use_fused_kernels=False"
    ):
        tap.take()  # not active: nothing was kept
    tap.active = True
    model(x)
    kept = tap.take()
    assert torch.equal(kept, model.body(x)) and not kept.requires_grad
    with pytest.raises(RuntimeError, match="saw no hidden states"):
        tap.take()  # given up
