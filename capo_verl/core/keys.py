# SPDX-License-Identifier: Apache-2.0
"""A logit and the id of its token as one int64 that sorts as the support does: larger logit first,
then lower id.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOWEST = torch.iinfo(torch.int64).min
"""Below every key."""
NON_FINITE = torch.iinfo(torch.int64).max
"""Above every key: takes the place of the best one in a row that holds a value which is not finite.
"""

_ID_MASK = 0xFFFFFFFF


def flip_negative(bits: Tensor) -> Tensor:
    """Bits of a float to a signed integer of the same order, and back."""
    return bits ^ ((bits >> (8 * bits.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def keys_of(logits: Tensor, ids: Tensor) -> Tensor:
    """``logits`` of a dtype no wider than float32 and ``ids`` int64 of a broadcastable shape, to
    int64 keys.
    """
    ordered = flip_negative((logits.float() + 0.0).view(torch.int32))  # + 0.0 makes -0.0 equal 0.0
    return (ordered.long() << 32) | (_ID_MASK - ids)


def logits_of(keys: Tensor) -> Tensor:
    """The float32 logits of keys."""
    return flip_negative((keys >> 32).int()).view(torch.float32)


def ids_of(keys: Tensor) -> Tensor:
    """The int64 ids of keys."""
    return _ID_MASK - (keys & _ID_MASK)
