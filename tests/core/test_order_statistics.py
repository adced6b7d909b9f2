# SPDX-License-Identifier: Apache-2.0
"""Order statistics over ranks against NumPy's sort of everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist

from capo_verl.core.order_statistics import nearest_rank, ordered_keys
from tests.helpers.spawn import run_on_ranks
from tests.helpers.syncs import recorded_syncs

DTYPES = (np.float32, np.float64)
FRACTIONS = (0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 1.0)


def values_of(case: str, rank: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of values ``[2, M]`` of a rank, and which of them count ``[M]``."""
    rng = np.random.default_rng((rank, len(case)))
    m = {
        "lengths differ": 40 * rank + 3,
        "a rank without positions": 17 * (rank % 2),
        "one value": 5,
    }.get(case, 101)
    values = rng.standard_normal((2, m)) * 10.0 ** rng.integers(-30, 30, (2, m))
    valid = rng.random(m) < 0.7
    if case == "ties":
        values = rng.choice([-2.0, -0.0, 0.0, 1e-40, 3.0], (2, m))
    if case == "a rank without tokens":
        valid[:] = valid & (rank != 0)
    if case == "infinities":
        values[:, ::3], values[:, 1::3] = np.inf, -np.inf
    if case == "one value":
        valid[:] = (np.arange(m) == 2) & (rank == 0)
    if case == "none":
        valid[:] = False
    values[:, ~valid] = rng.choice(
        [np.nan, np.inf, -np.inf, 0.0], (2, int((~valid).sum()))
    )  # must not be looked at
    return values.astype(dtype), valid


CASES = ("random", "lengths differ", "a rank without positions", "a rank without tokens", "ties",
    "infinities",
         "one value", "none")  # fmt: skip


def found_on_this_rank(mesh: tuple[int, int]) -> dict[tuple[str, type], np.ndarray]:
    """All cases on ``mesh`` data- times context-parallel ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    groups: tuple = (None, None)
    if dist.is_initialized():
        devices = dist.device_mesh.init_device_mesh("cpu", mesh, mesh_dim_names=("dp", "cp"))
        groups = (devices["dp"].get_group(), devices["cp"].get_group())
    found = {}
    for case, dtype in product(CASES, DTYPES):
        values, valid = (torch.from_numpy(x) for x in values_of(case, rank, dtype))
        count = valid.sum()
        if dist.is_initialized():
            dist.all_reduce(count)
        keys = ordered_keys(values, valid)
        with recorded_syncs() as syncs:
            result = nearest_rank(keys, count, FRACTIONS, groups)
        assert syncs == []
        found[case, dtype] = result.numpy()
    return found


def expected(case: str, world_size: int, dtype: type) -> np.ndarray:
    parts = [values_of(case, rank, dtype) for rank in range(world_size)]
    everything = np.concatenate([values[:, valid] for values, valid in parts], axis=1)
    n = everything.shape[1]
    if n == 0:
        return np.zeros((2, len(FRACTIONS)), dtype)
    return np.sort(everything, axis=1)[:, [round(q * (n - 1)) for q in FRACTIONS]]


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (2, 2)])
def test_equal_to_sorting_everything(mesh):
    world_size = mesh[0] * mesh[1]
    ranks = (
        [found_on_this_rank(mesh)]
        if world_size == 1
        else run_on_ranks(found_on_this_rank, world_size, mesh)
    )
    for case, dtype in product(CASES, DTYPES):
        exact = expected(case, world_size, dtype)
        for found in ranks:
            assert found[case, dtype].dtype == dtype
            np.testing.assert_array_equal(
                found[case, dtype], exact, err_msg=f"{case}, {dtype.__name__}"
            )


def test_nan_is_above_infinity_and_below_nothing_else():
    values = torch.tensor([[np.nan, -np.nan, np.inf, 1.0, -1.0]])
    keys = ordered_keys(values, torch.ones(5, dtype=torch.bool))
    assert keys[0, 0] == keys[0, 1] > keys[0, 2] > keys[0, 3] > keys[0, 4]
    top = nearest_rank(keys, torch.tensor(5), (0.0, 0.5, 1.0), ())
    assert top[0, :2].tolist() == [-1.0, np.inf] and top[0, 2].isnan()


def test_half_precision_is_exact_in_float32():
    values = torch.tensor([[3.0, -1.5, 0.25]], dtype=torch.bfloat16)
    keys = ordered_keys(values, torch.ones(3, dtype=torch.bool))
    assert nearest_rank(keys, torch.tensor(3), (0.0, 0.5, 1.0), ()).tolist() == [[-1.5, 0.25, 3.0]]
