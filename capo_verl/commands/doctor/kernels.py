# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, run on the GPU or compiled for one.

``python -m capo_verl.commands.doctor.kernels`` prints the outcome as JSON.

A process of its own: a faulty kernel may end the process that runs it, and in Triton's interpreter
nothing can be compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from dataclasses import asdict

import torch

from capo_verl.commands.doctor.answering_process import AnsweringProcess
from capo_verl.commands.doctor.check import FAIL, OK, SKIPPED, WARN, Broken, Outcome

SECONDS = 180.0
CAPABILITY = 90
"""Target of the compilation where there is no GPU: H100 (sm_90)."""


def start() -> AnsweringProcess:
    """Begin."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return AnsweringProcess("capo_verl.commands.doctor.kernels", environment=environment)


def judge(child: AnsweringProcess) -> Outcome:
    """
    Raises:
        Broken: if the kernels could not be compiled or run.
    """
    try:
        return Outcome(**child.answer(SECONDS))
    except Broken as e:
        raise Broken(
            f"the kernels fail: {e}; install the triton that belongs to this torch "
            "(scripts/check_stack.py)"
        ) from None


def examine() -> Outcome:
    """Run the kernels, or compile them, as this machine allows."""
    triton, gpu = importlib.util.find_spec("triton"), torch.cuda.is_available()
    if not triton and gpu:
        return Outcome(
            WARN,
            "triton is missing, so the GPU runs the kernels' plain torch twins: pip install triton",
        )
    if not triton:
        return Outcome(
            SKIPPED,
            "no GPU and no triton here: on a CPU the plain torch kernels run; pip install triton "
            "to compile",
        )
    if gpu:
        return _run()
    from capo_verl.core.kernels.fused.ahead_of_time import compile_all

    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # what was compiled some time ago proves nothing
        compiled = compile_all(CAPABILITY)
    return Outcome(OK, f"no GPU here; {len(compiled)} variants compile for sm_{CAPABILITY}")


def _run() -> Outcome:
    from capo_verl.commands.doctor.deviations import TOLERANCE, deviations

    found, name = deviations(torch.device("cuda")), torch.cuda.get_device_name()
    wrong = {what: deviation for what, deviation in found.items() if not deviation <= TOLERANCE}
    if wrong:
        listed = ", ".join(f"{what} by {deviation:.2g}" for what, deviation in wrong.items())
        return Outcome(
            FAIL,
            f"on {name} kernels differ from plain torch ({listed}): install the triton that "
            "belongs to this torch",
        )
    return Outcome(
        OK,
        f"the kernels ran on {name} and equal plain torch (largest of {len(found)} deviations: "
        f"{max(found.values()):.1g})",
    )


if __name__ == "__main__":
    print(json.dumps(asdict(examine())))
