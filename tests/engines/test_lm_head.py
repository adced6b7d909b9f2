# SPDX-License-Identifier: Apache-2.0
"""What is seen of an LM head in half precision, and when its product may be taken for the model's
logits.
"""

from __future__ import annotations

import pytest
import torch
import verl  # noqa: F401  plugins first
from torch import nn

from capo_verl.core import ProjectedLogits
from capo_verl.engines.lm_head import HiddenStatesTap, LMHeadCall, reproduces, watch_half_precision

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = (3 * torch.randn(2, 10, 64, generator=GENERATOR)).bfloat16()
WEIGHT = (0.3 * torch.randn(300, 64, generator=GENERATOR)).bfloat16()
AT = torch.tensor([1, 4, 5, 19])


def lm_head(bias: bool = False) -> nn.Linear:
    layer = nn.Linear(64, 300, bias=bias).bfloat16()
    layer.weight.data = WEIGHT.clone()
    return layer


def calls(module: nn.Module, wanted: bool = True) -> list[LMHeadCall]:
    seen: list[LMHeadCall] = []
    watch_half_precision(module, lambda: wanted, seen.append)
    return seen


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_in_float32_is_that_of_float64(bias):
    layer = lm_head(bias)
    seen, output = calls(layer), layer(HIDDEN)
    (call,) = seen
    expected = HIDDEN.double() @ WEIGHT.double().T + (layer.bias.double() if bias else 0)
    found = call.head.in_float32(call.hidden_states.flatten(0, 1)).view(2, 10, 300)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert (output.double() - expected).abs().max() > 1e-2  # what rounding does
    assert torch.equal(call.output, output)


def test_a_weight_that_is_passed_takes_the_place_of_the_modules_own():
    class Tied(nn.Module):
        weight = None

        def forward(self, hidden_states, weight=None):
            return hidden_states @ weight.T, None

    layer = Tied()
    seen = calls(layer)
    layer(HIDDEN, weight=WEIGHT)
    layer(HIDDEN, WEIGHT)
    assert all(torch.equal(call.head.weight, WEIGHT) for call in seen) and len(seen) == 2


def test_autocast_multiplies_rounded_weights():
    layer = nn.Linear(64, 300, bias=False)
    seen = calls(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(HIDDEN.float())
    assert torch.equal(seen[0].head.weight, layer.weight.bfloat16())


def test_nothing_is_shown_in_float32_or_unless_it_is_wanted():
    layer, idle = nn.Linear(64, 300), lm_head()
    seen, unwanted = calls(layer), calls(idle, wanted=False)
    layer(HIDDEN.float())
    idle(HIDDEN)
    assert not seen and not unwanted


def test_a_head_with_an_adapter_is_no_matrix():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = lm_head()

        def forward(self, hidden_states):
            return self.base_layer(hidden_states)

    module = Wrapped()
    seen = calls(module)
    module(HIDDEN)
    assert seen[0].head is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x, True),
        (lambda x: x.float(), True),
        (lambda x: x * 1.125, False),
        (lambda x: 1000 * (x.float() / 1000).tanh(), False),  # hardly any cap
        (lambda x: x.index_add(1, torch.tensor([7]), torch.ones(len(x), 1, dtype=x.dtype)), False),
    ],
    ids=["none", "converted", "scaled", "capped", "one-row"],
)
def test_what_the_model_does_to_its_logits(dtype, change, expected):
    hidden, weight = HIDDEN.flatten(0, 1).to(dtype), WEIGHT.to(dtype)
    made = hidden @ weight.T
    again = ProjectedLogits(weight).in_float32(hidden[AT])
    assert bool(reproduces(again, made, change(made), AT)) is expected


def test_what_the_head_itself_does_otherwise():
    """In place, so that output and logits are the same tensor; and no tokens say nothing."""
    hidden = HIDDEN.flatten(0, 1)
    made = hidden @ WEIGHT.T
    again = ProjectedLogits(WEIGHT).in_float32(hidden[AT])
    assert not reproduces(again, made * 1.0625, made * 1.0625, AT)
    assert reproduces(again[:0], made * 2, made, AT[:0])


class Adapter(nn.Module):
    """A layer wrapped for LoRA as by Megatron-Bridge, under ``to_wrap``, without attributes."""

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
