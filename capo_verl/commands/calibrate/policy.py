# SPDX-License-Identifier: Apache-2.0
"""A causal language model as a body and an LM head, and how deep in it a parameter lies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from capo_verl.commands.calibrate.rollouts import Rollouts

DEPTHS = ("head", "last_layer", "last_half", "all")
"""Parameters that move: the LM head; with it the last layer and the final norm; half of the
layers; every parameter.
"""


class Policy:
    """A model as the measurement needs it.

    Args:
        model: whose parameters are trained; without dropout.
        body: ``[B, L]`` token ids to ``[B, L, H]``, the input of the LM head, causal.
        head: the LM head; its logits are the policy's. May share its weight with the embedding.
        layers: number of layers; a parameter's layer is the first number in its name.
    """

    def __init__(
        self, model: nn.Module, body: Callable[[Tensor], Tensor], head: nn.Linear, layers: int
    ):
        self.model, self.body, self.head, self.layers = model, body, head, layers
        self.parameters: dict[str, nn.Parameter] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        modules = dict(model.named_modules())
        shared = {
            id(p)
            for m in modules.values()
            if m is not head
            for p in m._parameters.values()
            if p is not None
        }
        self.tied = id(head.weight) in shared
        """The embedding is the LM head's weight."""
        self._first_layer_parameter = next(
            (i for i, n in enumerate(self.parameters) if _layer(n) is not None), 0
        )

    def hidden(self, rollouts: Rollouts) -> Tensor:
        """``[N, H]``, the input of the LM head at the positions that predict the response
        tokens.
        """
        return self.body(rollouts.input_ids)[rollouts.positions]

    def is_head(self, name: str) -> bool:
        """True if it is the LM head's own (perhaps shared) weight or bias."""
        return any(self.parameters[name] is p for p in self.head.parameters())

    def height(self, name: str) -> int:
        """Layers from the top: 0 = LM head, 1 = last layer and what is behind it, ``layers`` =
        first, more = embedding.
        """
        if self.is_head(name):
            return 0
        layer = _layer(name)
        if layer is not None:
            return self.layers - layer
        before = list(self.parameters).index(name) < self._first_layer_parameter
        return self.layers + 1 if before else 1

    def moves(self, name: str, depth: str) -> bool:
        """True if a parameter moves when training goes as deep as ``depth``, one of :data:`DEPTHS`.

        Raises:
            ValueError: for another depth.
        """
        if depth not in DEPTHS:
            raise ValueError(f"depth={depth!r}: expected one of {', '.join(DEPTHS)}")
        limit = {
            "head": 0,
            "last_layer": 1,
            "last_half": -(-self.layers // 2),
            "all": self.layers + 1,
        }[depth]
        return self.height(name) <= limit


def _layer(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def from_hugging_face(model: Any) -> Policy:
    """The policy of a Hugging Face causal language model.

    Raises:
        ValueError: if its logits are not its LM head's output (scaled or capped logits), which the
            last-layer geometry of CAPO does not describe.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has no linear LM head; calibrate needs a causal language model"
        )
    model.eval()
    body = model.base_model

    def hidden(ids: Tensor) -> Tensor:
        states: Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
        return states

    with torch.no_grad():
        ids = torch.arange(2, 6, device=head.weight.device)[None]
        expected, found = model(input_ids=ids, use_cache=False).logits, head(hidden(ids))
    if not torch.allclose(expected.float(), found.float(), rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} changes the output of its LM head (capped or scaled logits); "
            "CAPO predicts from logits = W h only, and cannot be calibrated on this architecture"
        )
    return Policy(model, hidden, head, int(model.config.num_hidden_layers))
