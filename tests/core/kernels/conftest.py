# SPDX-License-Identifier: Apache-2.0
"""The kernels run on a GPU where there is one, else in Triton's interpreter; what they allocate is
poisoned.
"""

from __future__ import annotations

import pytest
import torch

from capo_verl.commands.doctor import deviations

pytest.importorskip("triton", reason="needs triton: pip install .[test]")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed():
    """Fresh inputs on a GPU, where a race may depend on them; the same ones in CI."""
    print(
        "seed", torch.seed() if torch.cuda.is_available() else torch.manual_seed(0).initial_seed()
    )


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty() gives NaN and the largest integers: a place that a kernel leaves out is
    seen.
    """
    with deviations.poisoned_memory():
        assert torch.empty(3).isnan().all()
        yield
