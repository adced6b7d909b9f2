# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's gradient clipping, without its test for CUDA tensors.

``clip_grad_by_total_norm_fp32`` asserts ``grad.type() == 'torch.cuda.FloatTensor'``
(``megatron/core/optimizer/clip_grads.py:167``), a string that no view of torch can change. The norm
itself is computed by Megatron-Core.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def clip_grad_by_total_norm(
    parameters: Iterable[torch.Tensor] | torch.Tensor,
    max_norm: float,
    total_norm: float | torch.Tensor,
    use_decoupled_grad: bool = False,
) -> None:
    """Scale the gradients in place by ``max_norm / (total_norm + 1e-6)``, if that is below 1."""
    if use_decoupled_grad:
        raise ValueError("the precision-aware optimizer is not supported on the CPU")
    scale = max_norm / (float(total_norm) + 1.0e-6)
    if scale < 1.0:
        for parameter in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            if parameter.grad is not None:
                parameter.grad.detach().mul_(scale)


def install_grad_clip() -> None:
    import megatron.core.optimizer.optimizer as mcore_optimizer

    mcore_optimizer.clip_grad_by_total_norm_fp32 = clip_grad_by_total_norm
