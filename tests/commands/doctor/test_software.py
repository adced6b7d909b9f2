# SPDX-License-Identifier: Apache-2.0
"""The verdict on the installed versions."""

from __future__ import annotations

import pytest

from capo_verl.commands.doctor import software
from capo_verl.plugin import compat, stack
from tests.plugin.test_stack import gpu_report, pin


@pytest.mark.parametrize("fewer", [{}, {"torch": pin("torch")}], ids=["cpu lacks all", "close"])
def test_the_stack_that_is_here_is_named(fewer, monkeypatch):
    """However near the other one may be."""
    monkeypatch.setattr(stack, "present", lambda: "gpu")
    reports = [
        stack.check(compat.CPU, fewer.get, "3.11.7"),
        gpu_report(vllm="0.23.0", triton=None),
    ]
    outcome = software.compare(reports)
    assert outcome.status == "warn"  # nothing is known to be broken
    assert outcome.message == (
        "other versions than the tested ones; of the gpu stack, which is what is here, differ "
        "triton (missing), vllm==0.24.0 (0.23.0): scripts/check_stack.py --stack gpu says how to "
        "install it"
    )
    assert (
        f"GPU stack: not installed, 2 of {len(reports[1].packages) + 1} missing or wrong\n"
        in software.table(reports)
    )


def test_a_complete_stack_needs_no_table():
    reports = [stack.check(compat.CPU, {}.get, "3.11.7"), gpu_report()]
    outcome = software.compare(reports)
    assert outcome.status == "ok"
    assert outcome.message == (
        f"the gpu stack is complete: verl {pin('verl')}, torch 2.11.0+cu130, megatron-core 0.18.0, "
        "ray 2.60.0"
    )
    assert software.table(reports) == ""
    versions = software.versions(reports)
    assert (versions["python"], versions["vllm"], versions["fastapi"]) == ("3.11.7", "0.24.0", None)
