# SPDX-License-Identifier: Apache-2.0
"""The input of the LM head, picked up on its way there."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class HiddenStatesTap:
    """A forward pre-hook on the LM head that keeps the hidden states of the micro-batch in flight.

    Args:
        lm_head: the module; the hidden states are its first argument.

    Attributes:
        active: only while True anything is kept.
    """

    def __init__(self, lm_head: nn.Module):
        self.active = False
        self._hidden_states: Tensor | None = None
        lm_head.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.active:
            self._hidden_states = (args[0] if args else next(iter(kwargs.values()))).detach()

    def take(self) -> Tensor:
        """The hidden states in the layout of the LM head; the reference is given up.

        Raises:
            RuntimeError: if the model did not run its LM head, as with fused cross-entropy.
        """
        hidden_states, self._hidden_states = self._hidden_states, None
        if hidden_states is None:
            raise RuntimeError(
                "CAPO saw no hidden states: the model computed its loss without calling its LM head; "
                "set actor_rollout_ref.model.use_fused_kernels=False"
            )
        return hidden_states
