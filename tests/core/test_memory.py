# SPDX-License-Identifier: Apache-2.0
"""The formula of the memory table is that of the tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core.memory import filter_memory, fold_limit

MODELS = {"Qwen2.5-7B": (152_064, 3_584), "Qwen2.5-32B": (152_064, 5_120)}
PAGE = Path(__file__).parents[2] / "docs/parallelism.md"


def tensors(x: object) -> list[torch.Tensor]:
    """All tensors below ``x``, each storage once."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        return [t for v in x.values() for t in tensors(v)]
    if isinstance(x, list | tuple):
        return [t for v in x for t in tensors(v)]
    return tensors(vars(x)) if hasattr(x, "__dict__") and not isinstance(x, type) else []


def held(x: object) -> int:
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors(x)}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "tokens", [50, 400]
)  # 60 rows: up to 60 tokens stay unfolded with bfloat16 hidden states
def test_the_formula_counts_the_tensors(dtype, tokens):
    v, h, k = 60, 32, 8
    capo = CapoFilter(
        CapoConfig(top_k=k, moments_dtype=dtype, policy_shift_max=None, objective_shift_max=None),
        v,
        h,
    )
    expected = filter_memory(v, h, tokens, 1, dtype, top_k=k, hidden_bytes=2)
    assert capo.model.exp_avg.nbytes + capo.model.exp_avg_sq.nbytes == expected.moments
    torch.manual_seed(0)
    capo.evaluate(
        torch.randn(1, tokens, h).bfloat16(), torch.randn(1, tokens, v),
        torch.randint(v, (1, tokens)),
        torch.ones(1, tokens), torch.ones(1, tokens), 1e-3, temperature=torch.ones(1, tokens),
        skip_masked=True,
    )  # fmt: skip
    assert capo.model._accepted.nbytes == expected.row_sums
    # Both keep the same tensors; in particular, no logits.
    together = held(
        [
            capo._retained,
            capo.model._accepted._kept,
            capo.model._accepted._sums,
            capo.model._accepted._count,
        ]
    )
    assert together == pytest.approx(
        expected.tokens + expected.row_sums, abs=32
    )  # a few scalars, less than a token takes


def table() -> str:
    gb = 1e9
    header = (
        "model",
        "TP",
        "moments, float32",
        "moments, bfloat16",
        "16,384 tokens",
        "row sums, beyond",
    )
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, (v, h) in MODELS.items():
        for tp in (1, 4, 8):
            full, half = (
                filter_memory(v, h, 16_384, tp, dtype) for dtype in ("float32", "bfloat16")
            )
            rows = -(-v // tp)
            limit = fold_limit(rows, h) // (2 * h)
            cells = [f"{x / gb:.2f} GB" for x in (full.moments, half.moments, full.tokens)]
            sums = filter_memory(v, h, limit + 1, tp).row_sums
            lines.append(
                f"| {name} | {tp} | "
                + " | ".join(cells)
                + f" | {sums / gb:.2f} GB, {limit:,} tokens |"
            )
    return "\n".join(lines)


def test_the_documented_table_is_the_formulas():
    assert table() in PAGE.read_text(), table()
