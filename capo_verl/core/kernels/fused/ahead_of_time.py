# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel for a GPU that need not be there.

Not in Triton's interpreter, where they are no kernels.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from capo_verl.core.kernels.fused import curvature_kernel, moment_kernels, support_kernel
from capo_verl.core.keys import LOWEST, NON_FINITE

I64, F32, BF16 = "*i64", "*fp32", "*bf16"
ALIGNED = (
    "hidden",
    "logits",
    "token",
    "weight",
    "sums",
    "exp_avg",
    "exp_avg_sq",
    "ids",
    "probs",
    "keys",
)
"""Tensors from torch's allocator; as integers, strides and offsets that are multiples of 16."""


def variants() -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """Name -> (kernel, types of its arguments, constants), at the shapes of Qwen2.5-7B with TP
    1.
    """
    curvature = {
        "hidden": BF16, "ids": I64, "probs": F32, "actions": I64, "advantages": F32,
        "corrected": F32, "steps": I64, "sums": F32, "directions": F32, "eps": "fp32",
    }  # fmt: skip
    support = {"logits": BF16, "positions": I64, "keys": I64}
    rows = {
        "token": I64,
        "weight": F32,
        "offsets": I64,
        "rows": I64,
        "hidden": BF16,
        "sums": F32,
        "counts": I64,
    }
    betas = {"beta1": "fp32", "rest1": "fp32", "beta2": "fp32", "rest2": "fp32", "steps": I64}
    blocks = {"BLOCK_ENTRIES": moment_kernels.BLOCK_ENTRIES, "BLOCK_H": moment_kernels.BLOCK_H}
    k, n_rows, hidden_size = 50, 152_064, 3_584
    found = {}
    for dtype in (F32, BF16):
        moments, stochastic = {"exp_avg": dtype, "exp_avg_sq": dtype}, {"STOCHASTIC": dtype == BF16}
        name = dtype.removeprefix("*")
        block_k, block_h = curvature_kernel.blocks(k, hidden_size)
        for keep in (False, True):
            constants = {
                "K": k,
                "H": hidden_size,
                "BLOCK_K": block_k,
                "BLOCK_H": block_h,
                "KEEP": keep,
            }
            kernel = curvature_kernel._partial_sums_kernel, {**curvature, **moments}, constants
            found[f"partial_sums {name}{' directions' if keep else ''}"] = kernel
        found[f"update {name}"] = (
            moment_kernels._update_kernel,
            {**rows, **moments, **betas},
            {**blocks, **stochastic},
        )
        constants = {"BLOCK_H": blocks["BLOCK_H"], "ALL_ROWS": False, **stochastic}
        found[f"move {name}"] = moment_kernels._move_kernel, {**rows, **moments, **betas}, constants
    for add in (False, True):
        constants = {**blocks, "ADD": add, "ALL_ROWS": add}
        found[f"row_sums add={add}"] = moment_kernels._row_sums_kernel, rows, constants
    for temperature in (None, BF16, F32):  # F32: of a projection
        constants = {
            **support_kernel.constants(k, n_rows), "LOWEST": LOWEST, "NON_FINITE": NON_FINITE,
            "HAS_POSITIONS": True, "HAS_TEMPERATURE": temperature is not None,
        }  # fmt: skip
        found[f"best_keys temperature={temperature}"] = (
            support_kernel._best_keys_kernel,
            {**support, "temperatures": temperature or BF16},
            constants,
        )
    return found


def compile_all(capability: int) -> dict[str, dict[str, Any]]:
    """Every variant for a GPU.

    Args:
        capability: compute capability times ten, such as 90 for an H100.

    Returns:
        Name -> what Triton's stages made of it, among them ``ptx`` (str) and ``cubin`` (bytes).
    """
    found = {}
    for name, (kernel, types, constants) in variants().items():
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        divisible = [n for n in names if n in ALIGNED or signature[n] == "i32" and n != "rows"]
        source = ASTSource(
            kernel, signature, {(names.index(n),): value for n, value in constants.items()},
            {(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
        )  # fmt: skip
        found[name] = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
    return found
