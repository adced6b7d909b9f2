# SPDX-License-Identifier: Apache-2.0
"""What the Megatron engine holds on one rank after an optimizer step, run on gloo ranks."""

from __future__ import annotations

from tests.cpu.megatron.engine_cases import Layout, make_engine, train_step


def held_bytes(layout: Layout, model_path: str) -> dict[str, int]:
    """Bytes of parameters, gradient buffers and Adam's state, and how many parameters the rank
    has.
    """
    from megatron.core import mpu

    engine = make_engine(layout, model_path, optimizer="adam", lr=1e-3)
    train_step(engine)
    parameters = [p for chunk in engine.module for p in chunk.parameters()]
    optimizers = getattr(engine.optimizer, "chained_optimizers", [engine.optimizer])
    states = [s for o in optimizers for s in o.optimizer.state.values()]
    return {
        "stage": mpu.get_pipeline_model_parallel_rank(),
        "tensors": len(parameters),
        "parameters": sum(p.nbytes for p in parameters),
        "gradients": sum(
            buffer.grad_data.nbytes
            for chunk in engine.module
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ),
        "optimizer": sum(
            state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq")
        ),
    }
