# SPDX-License-Identifier: Apache-2.0
"""The bridge through which the Megatron engines of the tests load and export weights."""

from __future__ import annotations

import os
from typing import Any

BRIDGES = ("mbridge", "megatron-bridge")
ENVIRONMENT = "CAPO_TEST_BRIDGE"
"""Variable that chooses one of them; mbridge by default, which every stack has."""


def settings_of(bridge: str = "") -> dict[str, Any]:
    """``actor_rollout_ref.actor.megatron`` for a bridge, by default the one of the environment.

    Megatron-Bridge then pads the vocabulary as far as mbridge does on a CPU.
    """
    bridge = bridge or os.environ.get(ENVIRONMENT, BRIDGES[0])
    if bridge == "mbridge":
        return {"vanilla_mbridge": True}
    padding = {"should_pad_vocab": True, "make_vocab_size_divisible_by": 1}
    return {"vanilla_mbridge": False, "override_transformer_config": padding}
