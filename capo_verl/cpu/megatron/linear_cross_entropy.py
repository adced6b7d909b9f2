# SPDX-License-Identifier: Apache-2.0
"""verl's fused LM head and cross-entropy in plain torch.

The original is ``verl/utils/kernel/linear_cross_entropy.py``.

verl's are Triton kernels for CUDA. Here the logits of a run of tokens exist at a time, in the
forward pass and again in the backward pass. Like verl's, under tensor parallelism the gradient of
the hidden states is this rank's part of it: with sequence parallelism Megatron's gather adds the
parts up in its own backward pass, and without nobody does (see ``startup_checks``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from capo_verl.core import collectives
from capo_verl.core.chunks import chunk_slices, scratch_elements


class LinearCrossEntropy(torch.autograd.Function):
    """Signature and results of verl's ``LinearCrossEntropy``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: collectives.Group = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of the labels.

        Args:
            hidden: ``[..., H]``, N tokens in all; weight: ``[rows, H]``, this rank's rows of the
                vocabulary.
            labels: N integers, in any shape; ids over the whole vocabulary.
            dist_process_group: over which the rows are spread.

        Returns:
            Log-probability of the label and entropy of the distribution, ``[N]`` each, in nats.

        Raises:
            ValueError: for a reduction other than ``none``, which is all that verl uses.
        """
        if reduction != "none":
            raise ValueError(
                f"linear_cross_entropy on the CPU: reduction={reduction!r} is not supported; use "
                "'none'"
            )
        flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        start = collectives.rank(dist_process_group) * weight.shape[0]
        maximum = flat.new_empty(len(flat))
        # Sums of exp(z - maximum) and of z exp(z - maximum), and the label's z.
        sums = flat.new_zeros(3, len(flat))
        for tokens, logits in _logits(flat, weight, temperature):
            maximum[tokens] = logits.amax(-1)
            exp = (logits - maximum[tokens, None]).exp_()
            sums[0, tokens] = exp.sum(-1)
            sums[1, tokens] = exp.mul_(logits).sum(-1)
            row, here = _local_rows(labels[tokens], start, weight.shape[0])
            sums[2, tokens] = torch.where(here, logits.gather(-1, row[:, None])[:, 0], 0.0)
        overall = collectives.max_(maximum.clone(), (dist_process_group,))
        sums[:2] *= (maximum - overall).exp_()
        normaliser, weighted, of_label = collectives.sum_(sums, (dist_process_group,))
        log_normaliser = overall + normaliser.log()
        mean_logit = weighted / normaliser
        ctx.save_for_backward(hidden, weight, labels, log_normaliser, mean_logit)
        ctx.temperature, ctx.start = temperature, start
        return of_label - log_normaliser, log_normaliser - mean_logit

    @staticmethod
    def backward(ctx: Any, d_log_probs: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_normaliser, mean_logit = ctx.saved_tensors
        flat = hidden.reshape(-1, hidden.shape[-1])
        d_hidden, d_weight = torch.empty_like(flat), torch.zeros_like(weight)
        for tokens, logits in _logits(flat, weight, ctx.temperature):
            probs = (logits - log_normaliser[tokens, None]).exp_()
            # d entropy / d z = -p (z - E z); d log_prob / d z = onehot - p
            d_logits = (
                (mean_logit[tokens, None] - logits)
                .mul_(d_entropy[tokens, None])
                .sub_(d_log_probs[tokens, None])
            )
            d_logits.mul_(probs)
            row, here = _local_rows(labels[tokens], ctx.start, weight.shape[0])
            d_logits.scatter_add_(
                -1, row[:, None], torch.where(here, d_log_probs[tokens], 0.0)[:, None]
            )
            d_logits /= ctx.temperature
            d_hidden[tokens] = d_logits @ weight
            d_weight.addmm_(d_logits.T, flat[tokens])
        return d_hidden.view_as(hidden), d_weight, None, None, None, None


linear_cross_entropy = LinearCrossEntropy.apply


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    for tokens in chunk_slices(
        len(hidden), max(1, scratch_elements(hidden.device) // weight.shape[0])
    ):
        yield tokens, (hidden[tokens] @ weight.T) / temperature


def _local_rows(labels: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
    """Row of each label on this rank, 0 if it is on another one; and whether it is here."""
    row = labels - start
    here = (row >= 0) & (row < rows)
    return torch.where(here, row, 0), here


def install() -> None:
    """Replace verl's function in its Megatron engine and its patched Hugging Face models."""
    from verl.utils.kernel import linear_cross_entropy as in_kernels

    in_kernels.linear_cross_entropy = linear_cross_entropy


def install_in_megatron() -> None:
    """Likewise; the module has a name of its own for the function."""
    from verl.models.mcore import model_forward_fused

    install()
    model_forward_fused.linear_cross_entropy = linear_cross_entropy
