# SPDX-License-Identifier: Apache-2.0
"""The experts that a mixture of experts chooses while it generates, for verl's router replay
(``router_replay.mode=R3``).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

LAYER = re.compile(r"\blayers\.(\d+)\.")


class ExpertChoices:
    """Records the last forward pass of a Hugging Face model.

    Args:
        model: with routers that return the chosen experts last (``Qwen3MoeTopKRouter``).

    Raises:
        ValueError: if it has no router.
    """

    def __init__(self, model: torch.nn.Module):
        routers = {
            int(found[1]): module
            for name, module in model.named_modules()
            if type(module).__name__.endswith("TopKRouter") and (found := LAYER.search(name))
        }
        if not routers:
            raise ValueError(
                "actor_rollout_ref.rollout.enable_rollout_routing_replay=True: "
                f"{type(model).__name__} has no experts to choose from; set it to False"
            )
        self._layers: int = model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
        self._seen: dict[int, Tensor] = {}
        for layer, router in routers.items():
            router.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
            self._seen[layer] = output[-1]

        return hook

    def of_last_pass(self, rows: int) -> Tensor:
        """Choices ``[rows, tokens, layers, experts per token]`` int16; 0 in a layer without
        experts.
        """
        some = next(iter(self._seen.values()))
        choices = some.new_zeros(len(some), self._layers, some.shape[-1], dtype=torch.int16)
        for layer, chosen in self._seen.items():
            choices[:, layer] = chosen.short()
        return choices.view(rows, -1, *choices.shape[1:])
