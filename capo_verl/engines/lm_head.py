# SPDX-License-Identifier: Apache-2.0
"""The LM head: this rank's part of it, and what it is given and makes of that while it works.

In half precision its output is rounded: of a logit near 16, bfloat16 keeps steps of 1/16. Whoever
compares two policies that are closer than that needs the product again, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from capo_verl.config import CapoConfig
from capo_verl.core import CapoFilter, ProjectedLogits, collectives
from capo_verl.core.chunks import chunk_slices, scratch_elements
from capo_verl.core.logits import VocabShard


@dataclass(frozen=True)
class LMHead:
    """This rank's part of the LM head, and the ranks over which vocabulary and tokens are spread.

    An engine makes it once; the filter, the hook on the hidden states and the KL probe come from
    it.
    """

    module: nn.Module
    """The LM head as the model calls it, with adapters around it if there are any."""
    linear: nn.Module
    """The same without adapters; its first argument is the hidden states."""
    shard: VocabShard
    hidden_size: int
    tp_group: collectives.Group = None
    dp_group: collectives.Group = None
    cp_group: collectives.Group = None

    def make_filter(self, config: CapoConfig, device: torch.device) -> CapoFilter:
        """A filter for these rows, whose moments live on ``device``."""
        return CapoFilter(
            config,
            vocab_size=self.shard.vocab_size,
            hidden_size=self.hidden_size,
            device=device,
            tp_group=self.tp_group,
            dp_group=self.dp_group,
            cp_group=self.cp_group,
            padded_vocab_size=self.shard.rows * collectives.size(self.tp_group),
        )


class LMHeadCall(NamedTuple):
    """One call of the LM head, in its layout."""

    hidden_states: Tensor
    """``[..., H]``"""
    head: ProjectedLogits | None
    """This rank's rows as they were multiplied; None if the module is more than one matrix
    (adapters), or not whole.
    """
    output: Tensor
    """``[..., rows]``, in half precision."""


def watch_half_precision(
    lm_head: nn.Module, wanted: Callable[[], bool], look: Callable[[LMHeadCall], None]
) -> None:
    """Show every call of an LM head whose output is in half precision to ``look``, as long as
    ``wanted()``.

    Args:
        lm_head: as the model calls it, with adapters around it if there are any. The hidden states
            are its first argument; a weight in its arguments (Megatron's tied embeddings) takes the
            place of its own. Its output is the logits, or a tuple which begins with them.
    """

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        if not wanted() or made.dtype.itemsize >= 4:
            return
        hidden_states = args[0] if args else next(iter(kwargs.values()))
        given = args[1] if len(args) > 1 else kwargs.get("weight")
        head = _matrix(module, given, made) if next(module.children(), None) is None else None
        look(LMHeadCall(hidden_states.detach(), head, made.detach()))

    # First of all hooks: FSDP2 frees the weight in one.
    lm_head.register_forward_hook(see, with_kwargs=True, prepend=True)


def _matrix(module: nn.Module, given: Tensor | None, made: Tensor) -> ProjectedLogits | None:
    weight, bias = (
        getattr(module, "weight", None) if given is None else given,
        getattr(module, "bias", None),
    )
    if (
        not isinstance(weight, Tensor)
        or isinstance(weight, DTensor)
        or not weight.is_floating_point()
    ):
        return None
    if weight.dim() != 2 or len(weight) != made.shape[-1]:
        return None
    # Under autocast the LM head multiplies a rounded copy of a float32 weight.
    return ProjectedLogits(weight.detach().to(made.dtype), None if bias is None else bias.detach())


def reproduces(recomputed: Tensor, made: Tensor, logits: Tensor, at: Tensor) -> Tensor:
    """True on the device if the model's logits are the LM head's output, as recomputed.

    The model may cap or scale what the LM head returns: then the two differ. What was recomputed
    may differ from the output by its rounding, whose root mean square is 0.2 of the dtype's step,
    and by that of partial sums in half precision on a GPU.

    Args:
        recomputed: ``[n, rows]`` in float32.
        made: ``[N, rows]``, what the LM head made, in half precision.
        logits: ``[N, rows]``, the model's, in any precision.
        at: ``[n]``, which of the N tokens were recomputed.
    """
    same = at.new_ones((), dtype=torch.bool)
    error, total = torch.zeros(2, device=at.device).unbind()
    for tokens in (
        chunk_slices(len(at), max(1, scratch_elements(at.device) // made.shape[-1]))
        if len(at)
        else ()
    ):
        output, again = made[at[tokens]], recomputed[tokens]
        same = same & (logits[at[tokens]] == output).all()
        error, total = error + (again - output).square().sum(), total + again.square().sum()
    return same & (error <= torch.finfo(made.dtype).eps ** 2 * total)


class FusedCall(NamedTuple):
    """The arguments of one call, as verl's forward pass gives them."""

    hidden_states: Tensor
    """``[..., H]`` in the layout of the model."""
    weight: Tensor
    """``[rows, H]``, this rank's rows of the LM head. FSDP frees it after the forward pass."""
    labels: Tensor
    temperature: float

    def logits(self) -> ProjectedLogits:
        """The logits, in the dtype in which the LM head would compute them here."""
        weight, device = self.weight.detach(), self.weight.device.type
        return ProjectedLogits(
            weight.to(torch.get_autocast_dtype(device))
            if torch.is_autocast_enabled(device)
            else weight
        )

    def temperatures(self) -> Tensor:
        """The temperature of each label, float32."""
        return torch.full(self.labels.shape, self.temperature, device=self.labels.device)


def of_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, *args: Any
) -> FusedCall:
    """Names the arguments of ``verl.utils.kernel.linear_cross_entropy.linear_cross_entropy``."""
    return FusedCall(hidden, weight, labels, temperature)


def of_fused_linear(
    module: Any,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float = 1.0,
) -> FusedCall:
    """Names the arguments of
    ``verl.utils.experimental.torch_functional.FusedLinearForPPO.forward``.
    """
    return FusedCall(hidden_states, vocab_weights, input_ids, temperature)


@contextmanager
def before_each_call(
    owner: Any, name: str, named: Callable[..., FusedCall], look: Callable[[FusedCall], None]
) -> Iterator[None]:
    """A context in which every call of ``owner.name`` is first shown to ``look``.

    The call itself is as before.

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
    "CAPO saw no hidden states: with use_fused_kernels=True the model computed its loss without "
    "calling verl's fused cross-entropy; set actor_rollout_ref.model.use_fused_kernels=False"
)


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
                "CAPO saw no hidden states: the model computed its loss without calling its LM "
                "head; set actor_rollout_ref.model.use_fused_kernels=False"
            )
        return hidden_states
