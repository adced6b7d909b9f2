# SPDX-License-Identifier: Apache-2.0
"""Waits of the host for the device in ``evaluate`` and ``step``: CUDA itself is asked."""

from __future__ import annotations

from collections.abc import Callable

import torch

from capo_verl.commands.doctor.check import FAIL, OK
from capo_verl.commands.doctor.gpu.rows import Row, not_run
from capo_verl.commands.measure.batch import LEARNING_RATE, make_batch
from capo_verl.commands.measure.workload import Workload
from capo_verl.config import CapoConfig
from capo_verl.core.filter import CapoFilter

TOKENS, HIDDEN = 1024, 256
ROWS = {"kept": 8192, "folded": 512}
"""Of the LM head: hidden states are folded into row sums where there are fewer rows than tokens."""


def examine(device: torch.device) -> list[Row]:
    """With either optimizer model, hidden states kept or folded."""
    if device.type != "cuda":
        return [not_run("waits", "torch.cuda.set_sync_debug_mode asks CUDA, and this is a CPU")]
    rows = []
    for optimizer_model in ("adam", "sgd"):
        for how, count in ROWS.items():
            step = one_step(optimizer_model, count, device)
            for _ in range(2):  # compiles; the first has no moments
                step()
            rows.append(_row(f"waits {optimizer_model}, {how}", wait(step)))
    return rows


def one_step(optimizer_model: str, rows: int, device: torch.device) -> Callable[[], None]:
    """Two micro-batches and the step, as an engine makes them."""
    workload = Workload("waits", rows, HIDDEN, 1, 50, (TOKENS,), device.type)
    config = CapoConfig(optimizer_model=optimizer_model)
    capo, batch = CapoFilter(config, rows, HIDDEN, device=device), make_batch(workload, TOKENS, 0)
    capo.keep_for_batch_shifts = False
    temperature = torch.ones(TOKENS, device=device)

    def step() -> None:
        for _ in range(2):
            capo.evaluate(
                batch.hidden_states, batch.logits, batch.actions, batch.advantages,
                batch.response_mask, LEARNING_RATE, temperature=temperature, skip_masked=True,
                max_tokens=TOKENS, check_values=False,
            )  # fmt: skip
        capo.step()

    return step


def wait(call: Callable[[], None]) -> str:
    """The place at which a call waits for the device; empty if it does not."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as e:
        frame = e.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        code = frame and f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
        return f"{' '.join(str(e).split())} ({code})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _row(name: str, found: str) -> Row:
    if found:
        return Row(name, FAIL, f"evaluate or step makes the host wait for the device: {found}")
    return Row(name, OK, "evaluate and step make the host wait for nothing")
