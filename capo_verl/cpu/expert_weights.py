# SPDX-License-Identifier: Apache-2.0
"""The weights of experts, as a checkpoint names them.

transformers 5 keeps those of all experts of a layer in one parameter, FSDP trains and sends it so;
a checkpoint, and what Megatron sends, has one matrix per expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STACKED = ("gate_up_proj", "down_proj")
"""Last part of the name of a parameter ``[experts, rows, columns]``."""


def one_by_one(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The same weights, with a view ``[rows, columns]`` of each expert's in the place of a stack.

    Others stay, so that both ways to name them come to the same names.

    Args:
        weights: tensors or arrays by name.
    """
    found: dict[str, Any] = {}
    for name, tensor in weights.items():
        layer, _, which = name.rpartition(".experts.")
        if which not in STACKED:
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"down_proj": matrix}
            if which == "gate_up_proj":
                half = len(matrix) // 2
                parts = {"gate_proj": matrix[:half], "up_proj": matrix[half:]}
            for part, view in parts.items():
                found[f"{layer}.experts.{expert}.{part}.weight"] = view
    return found
