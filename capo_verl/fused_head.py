# SPDX-License-Identifier: Apache-2.0
"""Where verl's fused cross-entropy is called: the one place that sees hidden states and LM head, and no logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from capo_verl.core import ProjectedLogits


class FusedCall(NamedTuple):
    """The arguments of one call, as verl's forward pass gives them."""

    hidden_states: Tensor
    """``[..., H]`` in the layout of the model."""
    weight: Tensor
    """``[rows, H]``, this rank's rows of the LM head. FSDP frees it after the forward pass."""
    labels: Tensor
    temperature: float

    def logits(self) -> ProjectedLogits:
        """In the dtype in which the LM head would compute them here."""
        weight, device = self.weight.detach(), self.weight.device.type
        return ProjectedLogits(
            weight.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else weight
        )

    def temperatures(self) -> Tensor:
        """One for each label, float32."""
        return torch.full(self.labels.shape, self.temperature, device=self.labels.device)


def of_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, *args: Any
) -> FusedCall:
    """Names the arguments of ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``."""
    return FusedCall(hidden, weight, labels, temperature)


def of_fused_linear(
    module: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> FusedCall:
    """Names the arguments of ``verl.utils.experimental.torch_functional.FusedLinearForPPO.forward``."""
    return FusedCall(hidden_states, vocab_weights, input_ids, temperature)


@contextmanager
def before_each_call(
    owner: Any, name: str, named: Callable[..., FusedCall], look: Callable[[FusedCall], None]
) -> Iterator[None]:
    """Within, every call of ``owner.name`` is first shown to ``look``; the call itself is as before.

    Args:
        owner: a module or a class.
        named: the arguments of such a call -> :class:`FusedCall`.
    """
    function = getattr(owner, name)

    def looked_at(*args: Any, **kwargs: Any) -> Any:
        look(named(*args, **kwargs))
        return function(*args, **kwargs)

    setattr(owner, name, looked_at)
    try:
        yield
    finally:
        setattr(owner, name, function)


NOT_CALLED = (
    "CAPO saw no hidden states: with use_fused_kernels=True the model computed its loss without calling verl's fused "
    "cross-entropy; set actor_rollout_ref.model.use_fused_kernels=False"
)
