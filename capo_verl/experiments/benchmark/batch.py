# SPDX-License-Identifier: Apache-2.0
"""Random batches whose supports overlap as those of a language model do.

Logits are ``-1.5 log(rank + 2.7) + 3 noise``: a fixed unigram distribution (Zipf-Mandelbrot; ranks
are dealt to the vocabulary at random) and independent Gaussian noise per token and row. The 50
largest then hold about 0.9 of the probability and the largest 0.4; frequent rows are in the
supports of many tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from capo_verl.core.chunks import chunk_slices
from capo_verl.experiments.benchmark.workload import Workload

LEARNING_RATE = 3e-6
_ZIPF_EXPONENT, _ZIPF_SHIFT, _NOISE = 1.5, 2.7, 3.0
_OFF_SUPPORT = 0.02
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Batch:
    """N tokens, all of them response tokens."""

    hidden_states: Tensor
    """``[N, H]``, standard normal."""
    logits: Tensor
    """``[N, rows]``"""
    actions: Tensor
    """Actions, ``[N]`` int64.

    They are drawn from the renormalised policy on the support; one in fifty from the whole
    vocabulary.
    """
    advantages: Tensor
    """``[N]`` float32, standard normal."""
    response_mask: Tensor
    """``[N]`` bool"""
    support: Tensor
    """``[N, k]`` int32, ids of the k largest logits."""

    def part(self, tokens: slice) -> Batch:
        """Some of the tokens, without copying."""
        return Batch(*(getattr(self, name)[tokens] for name in self.__dataclass_fields__))

    @property
    def distinct_rows(self) -> int:
        """Vocabulary rows that are in some support."""
        return len(self.support.unique())


def make_batch(
    workload: Workload, tokens: int, seed: int, dtype: torch.dtype | None = None
) -> Batch:
    """Drawn on the device, a run of tokens at a time: needs little memory beside the result.

    Args:
        tokens: N.
        seed: batches of different seeds share the unigram distribution.
        dtype: of hidden states and logits; default: the workload's.
    """
    device, rows, k = workload.device, workload.rows, workload.top_k
    dtype = dtype or workload.model_dtype
    ranks = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(device)
    unigram = -_ZIPF_EXPONENT * torch.log(ranks + _ZIPF_SHIFT)
    draw = torch.Generator(device).manual_seed(seed)
    hidden_states = torch.empty(tokens, workload.hidden_size, device=device, dtype=dtype)
    logits = torch.empty(tokens, rows, device=device, dtype=dtype)
    support = torch.empty(tokens, k, device=device, dtype=torch.int32)
    actions = torch.empty(tokens, device=device, dtype=torch.int64)
    for part in chunk_slices(tokens, max(1, _CHUNK_ELEMENTS // max(rows, workload.hidden_size))):
        n = part.stop - part.start
        hidden_states[part] = torch.randn(n, workload.hidden_size, device=device, generator=draw)
        logits[part] = (
            torch.randn(n, rows, device=device, generator=draw).mul_(_NOISE).add_(unigram)
        )
        values, ids = logits[part].topk(k)
        chosen = torch.multinomial(values.float().softmax(-1), 1, generator=draw)
        anywhere = torch.randint(rows, (n,), device=device, generator=draw)
        off = torch.rand(n, device=device, generator=draw) < _OFF_SUPPORT
        support[part], actions[part] = ids, torch.where(off, anywhere, ids.gather(1, chosen)[:, 0])
    return Batch(
        hidden_states, logits, actions,
        advantages=torch.randn(tokens, device=device, generator=draw),
        response_mask=torch.ones(tokens, device=device, dtype=torch.bool),
        support=support,
    )  # fmt: skip
