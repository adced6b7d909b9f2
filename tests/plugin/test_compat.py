# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine beside a trl that has lost the class which verl patches; Megatron-Bridge
beside a vocabulary that it has padded.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from capo_verl.plugin import compat


@pytest.mark.parametrize(
    ("installed", "module", "available"),
    [
        (True, None, False),
        (True, "trl", True),
        (True, "trl.experimental.ppo", True),
        (False, "trl", False),
    ],
)
def test_trl_counts_if_it_has_the_class(installed, module, available, monkeypatch) -> None:
    for name in ("trl", "trl.experimental", "trl.experimental.ppo"):
        fake = ModuleType(name)
        fake.__path__ = []
        monkeypatch.setitem(sys.modules, name, fake)
    if module:
        sys.modules[module].AutoModelForCausalLMWithValueHead = object
    verl_module = SimpleNamespace(is_trl_available=lambda: installed)
    compat.shim_trl(verl_module)
    assert verl_module.is_trl_available() is available


def test_verls_module_is_shimmed() -> None:
    pytest.importorskip("verl")
    from verl.models.transformers import monkey_patch

    assert monkey_patch.is_trl_available.__module__ == "capo_verl.plugin.compat"


@pytest.mark.parametrize(
    ("parameter", "rows"),
    [
        ("embedding.word_embeddings.weight", 125),
        ("output_layer.weight", 125),
        ("decoder.layers.0.mlp.linear_fc2.weight", 128),
    ],
)
def test_padding_of_the_vocabulary_is_not_exported(parameter, rows) -> None:
    class Bridge:
        hf_config = SimpleNamespace(vocab_size=125)

        def maybe_modify_converted_hf_weight(self, task, weights, state):
            return {**weights, **state}

    compat.trim_vocabulary(SimpleNamespace(MegatronModelBridge=Bridge))
    weights, task = torch.arange(256.0).view(128, 2), SimpleNamespace(global_param_name=parameter)
    exported = Bridge().maybe_modify_converted_hf_weight(task, {"a": weights}, {"b": weights + 1})
    assert exported.keys() == {"a", "b"}
    assert torch.equal(exported["a"], weights[:rows])
    assert torch.equal(exported["b"], weights[:rows] + 1)
