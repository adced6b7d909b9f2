# SPDX-License-Identifier: Apache-2.0
"""Both engines in bfloat16, the precision that runs train in: every decision against the float64
oracle, on the hidden states and the LM head that the engine saw.

``CAPO_VERL_WRITE_MATRIX=1 pytest tests/engines/test_bfloat16.py`` measures the table of
docs/parallelism.md afresh.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cpu.fsdp.engine_cases import FsdpLayout
from tests.cpu.megatron.engine_cases import Layout
from tests.engines.bfloat16_cases import Found, Half, Judged, Tokens, compare
from tests.helpers.documented_table import DocumentedTable
from tests.helpers.grouped import launch_by_size
from tests.helpers.tiny_model import make_tiny_model

pytestmark = pytest.mark.ranks

CASES = [
    Half(Layout(tp=2, sp=True)),
    Half(Layout(tp=2, packed=False)),
    Half(Layout(dp=2, distributed_optimizer=True)),
    Half(Layout(pp=2)),
    Half(Layout(tp=2, sp=True), fused=True),
    Half(Layout(dp=2, distributed_optimizer=True), fused=True),
    Half(Layout(pp=2), fused=True),
    Half(FsdpLayout(dp=2)),
    Half(FsdpLayout("fsdp", 2, packed=False)),
    Half(FsdpLayout("fsdp", 2, fused="torch")),
    Half(FsdpLayout("fsdp", sp=2, fused="triton")),
]
SHIFTS = ("objective_shift", "policy_shift")
TOLERANCE = {"given": (5e-6, 1e-5), "exact": (0.03, 0.06)}
"""Of m_H and m_F. ``given``: float32 against float64. ``exact``: what rounding a logit to bfloat16
makes of them, three times what was measured; it grows with the logits, which are small here.
"""
TIE = {name: m_f for name, (_, m_f) in TOLERANCE.items()}
"""Relative distance to a threshold within which a decision may go either way."""
TIES = {"given": 1, "exact": 12}
"""At most so many of the 110 tokens may be ties."""
COLUMNS = ("layout", "m_H", "m_F", "ties", "m_H, exact", "m_F, exact", "ties, exact", "otherwise")
TABLE = DocumentedTable(
    Path(__file__).parents[2] / "docs/parallelism.md", "bfloat16", COLUMNS, [str(c) for c in CASES]
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(
        tmp_path_factory.mktemp("model"), num_attention_heads=8, num_key_value_heads=4
    )


@pytest.fixture(scope="module")
def found_in(request, model):
    return launch_by_size(request, compare, lambda case: (case, model, TIE["given"]))


@pytest.fixture(scope="module")
def measured():
    with TABLE.measured() as rows:
        yield rows


def deviations(tokens: Tokens, judged: Judged, name: str) -> np.ndarray:
    """``[tokens]``, as a share of the value or of the step's median, whichever is larger."""
    want = getattr(judged, name)
    scale = np.maximum(np.abs(want), np.median(np.abs(want)))
    return np.abs(getattr(tokens, name) - want) / scale


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decisions_are_those_of_float64_away_from_ties(case, found_in, measured):
    found: Found = found_in(case)[0]
    assert found.dtypes == {torch.bfloat16}
    assert all(0 < step.accepted.sum() < len(step.accepted) == 55 for step in found.tokens)
    cells, otherwise = [], []
    for logits, judged in found.judged.items():
        pairs = list(zip(found.tokens, judged, strict=True))
        ties = sum(int((verdict.distance < TIE[logits]).sum()) for _, verdict in pairs)
        differ = [verdict.distance[step.accepted != verdict.accepted] for step, verdict in pairs]
        assert all((distance < TIE[logits]).all() for distance in differ) and ties <= TIES[logits]
        for name, limit in zip(SHIFTS, TOLERANCE[logits], strict=True):
            apart = np.concatenate([deviations(*pair, name) for pair in pairs])
            assert apart.max() <= limit, (logits, name)
            cells.append(f"{apart.max():.0e}, {np.median(apart):.0e}")
        cells.append(str(ties))
        otherwise.append(str(sum(map(len, differ))))
    measured[str(case)] = [*cells, ", ".join(otherwise)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_ranks_that_have_a_token_decide_alike(case, found_in):
    """Tensor-parallel ranks bit for bit; and every rank was told the same of all."""
    first, second = found_in(case)
    for mine, others in zip(first.tokens, second.tokens, strict=True):
        assert mine.ranks_agree and np.array_equal(mine.accepted, others.accepted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_oracles_mask(case, found_in):
    """The same engine without a filter, the rejected tokens outside its response mask."""
    ranks = found_in(case)
    assert any(step.loss is not None for rank in ranks for step in rank.filtered)
    for rank in ranks:
        for filtered, masked in zip(rank.filtered, rank.masked, strict=True):
            assert filtered.loss == masked.loss
            assert any(gradient.any() for gradient in filtered.gradients)
            for gradient, expected in zip(filtered.gradients, masked.gradients, strict=True):
                assert torch.equal(gradient, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments_are_float32(case, found_in):
    moments = [rank.moments for rank in found_in(case) if rank.moments]
    assert len(moments) == (1 if getattr(case.layout, "pp", 1) == 2 else 2)
    assert all(dtypes == {torch.float32} for dtypes in moments)


def test_the_documented_table_is_of_these_layouts():
    for *shares, _ in TABLE.committed().values():
        for at, logits in ((0, "given"), (3, "exact")):
            limits = (*TOLERANCE[logits], TIES[logits])
            assert all(
                float(cell.split(",")[0]) <= limit
                for cell, limit in zip(shares[at : at + 3], limits, strict=True)
            )
