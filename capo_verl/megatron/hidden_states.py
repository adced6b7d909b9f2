# SPDX-License-Identifier: Apache-2.0
"""The input of the LM head, picked up on its way there."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn


def output_layer_of(model: nn.Module) -> nn.Module:
    """The LM head of an unwrapped Megatron model, text-only or multi-modal."""
    return getattr(model, "language_model", model).output_layer


class HiddenStatesTap:
    """A forward pre-hook on ``output_layer`` that keeps the hidden states of the micro-batch in flight.

    Args:
        model: the unwrapped last chunk of the pipeline.

    Attributes:
        active: only while True anything is kept.
    """

    def __init__(self, model: nn.Module):
        self.active = False
        self._sequence_parallel = bool(model.config.sequence_parallel)
        self._hidden_states: Tensor | None = None
        output_layer_of(model).register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active:
            hidden_states = args[0] if args else kwargs["input_"]
            self._hidden_states = hidden_states.detach()

    @torch.no_grad()
    def take(self) -> Tensor:
        """``[b, s, H]``, gathered over the sequence-parallel group; the reference is given up.

        Raises:
            RuntimeError: if the model did not run its ``output_layer``, as with fused cross-entropy.
        """
        hidden_states, self._hidden_states = self._hidden_states, None
        if hidden_states is None:
            raise RuntimeError(
                "CAPO saw no hidden states: the model computed its loss without calling output_layer; "
                "set actor_rollout_ref.model.use_fused_kernels=False"
            )
        if self._sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return hidden_states.transpose(0, 1)
