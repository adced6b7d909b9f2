# SPDX-License-Identifier: Apache-2.0
"""Memory of an engine's logits on one gloo rank, by the record of every allocation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capo_verl.plugin.checks.run_spec import RunSpec
from tests.cpu.megatron.engine_cases import Layout, make_batch, make_engine, nll

TOKENS, ROWS = 504, 8192
"""Enough for the logits to outweigh the rest of a model with 16 hidden units."""


def peak_bytes(run: RunSpec, model_path: str) -> dict[str, int]:
    """The most allocated at any time of a micro-batch of ``TOKENS``, beyond what is held before it.

    Args:
        run: engine, fused head and temperature of the run; not ``cpu``: the model works in
            bfloat16, and FSDP has flash-attention's cross-entropy.

    Returns:
        ``update``, ``update with entropy`` and ``log-probs``, in bytes.
    """
    from verl.utils import tensordict_utils as tu

    from capo_verl.commands.measure.memory import measure_memory

    engine, fused = _engine(run, model_path), bool(run.fused_head)

    def loss(model_output: dict[str, Any], data: Any, dp_group: Any = None) -> Any:
        value, metrics = nll(model_output, data, dp_group)
        if "entropy" in model_output:
            value = value - 0.01 * model_output["entropy"].values().mean()
        return value, metrics

    def pass_(entropy: bool, update: bool) -> None:
        rows = torch.randint(4, 100, (TOKENS,), generator=torch.Generator().manual_seed(0))
        batch = make_batch(engine, rows=[rows])
        batch.pop("temperature", None)  # one for all, as verl's trainer has it
        tu.assign_non_tensor(
            batch,
            temperature=run.temperature,
            use_fused_kernels=fused,
            calculate_entropy=entropy,
        )
        if update:
            with engine.train_mode():
                engine.forward_backward_batch(batch, loss)
        else:
            with engine.eval_mode(), torch.no_grad():
                engine.forward_backward_batch(batch, None, forward_only=True)

    passes = {
        "update": lambda: pass_(False, True),
        "update with entropy": lambda: pass_(True, True),
        "log-probs": lambda: pass_(True, False),
    }
    for one in passes.values():
        one()
    return {name: measure_memory("cpu", {name: one})[name].peak for name, one in passes.items()}


def _engine(run: RunSpec, model_path: str) -> Any:
    if run.engine == "megatron":
        from capo_verl.cpu.megatron import engine as cpu_engine

        cpu_engine.ENGINE_CONFIG["dtype"] = "float32" if run.cpu else "bfloat16"
        return make_engine(Layout(), model_path, use_fused_kernels=bool(run.fused_head))
    from verl.utils import torch_functional

    from tests.cpu.fsdp.engine_cases import FsdpLayout, make_fsdp_engine

    engine = make_fsdp_engine(FsdpLayout(run.engine, fused=run.fused_head), model_path)
    if not run.cpu:
        engine._autocast_dtype = torch.bfloat16
        torch_functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE = True
        torch_functional.cross_entropy_loss = lambda logits, labels, inplace_backward: (
            FlashCrossEntropy.apply(logits, labels, inplace_backward),
            None,
        )
    return engine


class FlashCrossEntropy(torch.autograd.Function):
    """Allocates what flash-attention's does (``flash_attn/ops/triton/cross_entropy.py``): its
    gradient is written over the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, inplace_backward: bool) -> Tensor:
        normaliser = torch.stack([row.float().logsumexp(-1) for row in logits])
        ctx.save_for_backward(logits, labels, normaliser)
        ctx.inplace_backward = inplace_backward
        return normaliser - logits.gather(-1, labels[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, normaliser = ctx.saved_tensors
        out = logits if ctx.inplace_backward else torch.empty_like(logits)
        for i, row in enumerate(logits):
            out[i] = (row.float() - normaliser[i]).exp_().mul_(grad[i])
        out[torch.arange(len(out)), labels] -= grad.to(out.dtype)
        return out, None, None
