# SPDX-License-Identifier: Apache-2.0
"""The recorder of synchronisations: it sees those it claims to see, and does not cry wolf."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capo_verl.core.order_statistics import ordered_keys
from tests.helpers.syncs import PACKAGE, recorded_syncs

X = torch.tensor([[3.0, 0.0, 1.0], [2.0, 5.0, 4.0]])
INDEX = torch.tensor([1, 0, 2])
JAGGED = torch.nested.nested_tensor_from_jagged(torch.ones(5), offsets=torch.tensor([0, 2, 5]))


WAITING = {
    "item": (lambda: X.sum().item(), "_local_scalar_dense"),
    "int": (lambda: int(X.sum()), "_local_scalar_dense"),
    "float": (lambda: float(X[0, 0]), "_local_scalar_dense"),
    "if": (lambda: "yes" if X.any() else "no", "_local_scalar_dense"),
    "slice by a tensor": (lambda: X[: INDEX[0]], "_local_scalar_dense"),
    "tolist": (lambda: X.tolist(), "tolist"),
    "numpy": (lambda: X.numpy(), "numpy"),
    "numpy.asarray": (lambda: np.asarray(X), "__array__"),
    "cpu": (lambda: X.cpu(), "cpu"),
    "to cpu": (lambda: X.to("cpu"), "to"),
    "to device cpu": (lambda: X.to(device=torch.device("cpu")), "to"),
    "tensor": (lambda: torch.tensor([1, 2]), "tensor"),
    "as_tensor": (lambda: torch.as_tensor([1, 2]), "as_tensor"),
    "asarray": (lambda: torch.asarray([1, 2]), "asarray"),
    "new_tensor": (lambda: X.new_tensor([1.0]), "new_tensor"),
    "index by a list": (lambda: X[[1, 0]], "__getitem__"),
    "assign by a list": (lambda: X.clone().__setitem__((0, [1, 0]), 1.0), "__setitem__"),
    "assign a number at an index": (lambda: X.clone().__setitem__((0, INDEX), 1.0), "__setitem__"),
    "assign a number to one element": (lambda: X.clone().__setitem__((0, -1), 1.0), "__setitem__"),
    "index by a mask": (lambda: X[X > 1], "index"),
    "index a column by a mask": (lambda: X[:, X[0] > 1], "index"),
    "assign a tensor by a mask": (
        lambda: X.clone().__setitem__(X > 1, torch.arange(4.0)),
        "index_put_",
    ),
    "masked_select": (lambda: X.masked_select(X > 1), "masked_select"),
    "nonzero": (lambda: X.nonzero(), "nonzero"),
    "where without values": (lambda: torch.where(X > 1), "nonzero"),
    "argwhere": (lambda: torch.argwhere(X > 1), "nonzero"),
    "unique": (lambda: X.unique(), "_unique2"),
    "unique rows": (lambda: X.unique(dim=0), "unique_dim"),
    "unique_consecutive": (lambda: X.unique_consecutive(), "unique_consecutive"),
    "bincount": (lambda: INDEX.bincount(minlength=9), "bincount"),
    "equal": (lambda: X.equal(X + 1), "equal"),
    "allclose": (lambda: torch.allclose(X, X + 1), "allclose"),
    "repeat_interleave": (lambda: X[0].repeat_interleave(INDEX), "repeat_interleave"),
    "repeats alone": (lambda: torch.repeat_interleave(INDEX), "repeat_interleave"),
    "multinomial": (lambda: X.multinomial(1), "multinomial"),
    "mode": (lambda: X.mode(), "mode"),
    "sorted elsewhere": (lambda: torch.searchsorted(X[0], X[1], sorter=INDEX), "searchsorted"),
    "histogram of the whole range": (lambda: X.histc(4), "histc"),
    "unbind jagged": (lambda: JAGGED.unbind(), "unbind"),
    "cholesky": (lambda: torch.linalg.cholesky(torch.eye(2)), "linalg_cholesky_ex"),
}


@pytest.mark.parametrize("name", WAITING)
def test_sees(name):
    operation, expected = WAITING[name]
    with recorded_syncs() as syncs:
        operation()
    assert expected in [sync.operation for sync in syncs]
    assert {sync.where for sync in syncs} == {""}  # nothing of the package is involved


HARMLESS = {
    "arithmetic": lambda: torch.where(X > 1, X, 0.0).sum(-1).clamp(max=2).double(),
    "sort": lambda: X.sort(-1).values.gather(-1, INDEX.expand(2, 3)),
    "index by integers": lambda: X[:, INDEX],
    "assign a tensor by integers": lambda: X.clone().__setitem__((slice(None), INDEX), X),
    "fill a slice": lambda: (
        X.clone().__setitem__(0, 1.0),
        X.clone().__setitem__((0, slice(0, 2)), 1.0),
    ),
    "index_fill": lambda: X.index_fill(1, INDEX, 0.0),
    "mask as a number": lambda: X.masked_fill(X > 1, 0.0) * (X > 1),
    "fill a mask": lambda: X.clone().__setitem__(X > 1, 0.0),
    "repeat_interleave": lambda: X[0].repeat_interleave(INDEX, output_size=3),
    "repeat_interleave by a number": lambda: X[0].repeat_interleave(2),
    "index_add": lambda: torch.zeros(3).index_add_(0, INDEX, X[0]),
    "searchsorted": lambda: torch.searchsorted(X[0].sort().values, X[1]),
    "histogram with bounds": lambda: X.histc(4, min=0, max=6),
    "new tensors": lambda: (
        torch.zeros(3),
        torch.full((2,), 7),
        X.new_ones(2),
        torch.arange(3),
        torch.as_tensor(X),
    ),
    "jagged": lambda: (JAGGED * 2).values(),
    "to another dtype": lambda: X.to(torch.float64),
    "topk": lambda: X.topk(2),
    "shape": lambda: X[: len(X), : X.shape[1] - 1],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_does_not_cry_wolf(name):
    with recorded_syncs() as syncs:
        HARMLESS[name]()
    assert syncs == []


def test_says_where(monkeypatch):
    """The line of the package that led to it."""
    monkeypatch.setattr(
        "capo_verl.core.order_statistics.flip_negative", lambda bits: bits[bits > 0]
    )
    with recorded_syncs() as syncs:
        ordered_keys(torch.ones(3), torch.ones(3, dtype=torch.bool))
    (sync,) = syncs
    assert sync.operation == "index" and sync.where.startswith("core/order_statistics.py:")
    line = int(sync.where.split(":")[1])
    assert (
        "flip_negative(bits)"
        in (PACKAGE / "core/order_statistics.py").read_text().splitlines()[line - 1]
    )
