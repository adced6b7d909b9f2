# SPDX-License-Identifier: Apache-2.0
"""The LM head at work: what it is given and what it makes of it, seen while its weight is whole.

In half precision its output is rounded: of a logit near 16, bfloat16 keeps steps of 1/16. Whoever compares two policies that are
closer than that needs the product again, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from capo_verl.core import ProjectedLogits
from capo_verl.core.chunks import chunk_slices, scratch_elements


class HeadCall(NamedTuple):
    """One call of the LM head, in its layout."""

    hidden_states: Tensor
    """``[..., H]``"""
    head: ProjectedLogits | None
    """This rank's rows as they were multiplied; None if the module is more than one matrix (adapters), or not whole."""
    output: Tensor
    """``[..., rows]``, in half precision."""


def watch_half_precision(lm_head: nn.Module, wanted: Callable[[], bool], look: Callable[[HeadCall], None]) -> None:
    """Show every call of an LM head whose output is in half precision to ``look``, as long as ``wanted()``.

    Args:
        lm_head: as the model calls it, with adapters around it if there are any. The hidden states are its first argument; a
            weight in its arguments (Megatron's tied embeddings) takes the place of its own. Its output is the logits, or a tuple
            which begins with them.
    """

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        if not wanted() or made.dtype.itemsize >= 4:
            return
        hidden_states = args[0] if args else next(iter(kwargs.values()))
        given = args[1] if len(args) > 1 else kwargs.get("weight")
        head = _matrix(module, given, made) if next(module.children(), None) is None else None
        look(HeadCall(hidden_states.detach(), head, made.detach()))

    # First of all hooks: FSDP2 frees the weight in one.
    lm_head.register_forward_hook(see, with_kwargs=True, prepend=True)


def _matrix(module: nn.Module, given: Tensor | None, made: Tensor) -> ProjectedLogits | None:
    weight, bias = getattr(module, "weight", None) if given is None else given, getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or not weight.is_floating_point():
        return None
    if weight.dim() != 2 or len(weight) != made.shape[-1]:
        return None
    # Under autocast the LM head multiplies a rounded copy of a float32 weight.
    return ProjectedLogits(weight.detach().to(made.dtype), None if bias is None else bias.detach())


def reproduces(recomputed: Tensor, made: Tensor, logits: Tensor, at: Tensor) -> Tensor:
    """Whether the model's logits are the LM head's output, and that is what was recomputed: bool, on the device.

    The model may cap or scale what the LM head returns: then the two differ. What was recomputed may differ from the output by
    its rounding, whose root mean square is 0.2 of the dtype's step, and by that of partial sums in half precision on a GPU.

    Args:
        recomputed: ``[n, rows]`` in float32.
        made: ``[N, rows]``, what the LM head made, in half precision.
        logits: ``[N, rows]``, the model's, in any precision.
        at: ``[n]``, which of the N tokens were recomputed.
    """
    same = at.new_ones((), dtype=torch.bool)
    error, total = torch.zeros(2, device=at.device).unbind()
    for tokens in chunk_slices(len(at), max(1, scratch_elements(at.device) // made.shape[-1])) if len(at) else ():
        output, again = made[at[tokens]], recomputed[tokens]
        same = same & (logits[at[tokens]] == output).all()
        error, total = error + (again - output).square().sum(), total + again.square().sum()
    return same & (error <= torch.finfo(made.dtype).eps ** 2 * total)
