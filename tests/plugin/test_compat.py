# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine beside a trl that has lost the class which verl patches."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

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
