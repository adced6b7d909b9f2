# SPDX-License-Identifier: Apache-2.0
"""Who is measured: the formulation as published, and CapoFilter with either set of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from capo_verl.benchmark.batch import LEARNING_RATE, Batch
from capo_verl.benchmark.naive import NaiveFilter
from capo_verl.benchmark.workload import Workload
from capo_verl.config import CapoConfig
from capo_verl.core.filter import CapoFilter

Stages = dict[str, Callable[[], Any]]
"""Name of a stage -> what it runs, in order. ``evaluate`` comes first and returns m_H, m_F and the accepted tokens."""


def accept_all(workload: Workload) -> CapoConfig:
    """The most work for the moments: no token is rejected."""
    return CapoConfig(top_k=workload.top_k, policy_shift_max=None, objective_shift_max=None, objective_shift_min=None)


class Contender(Protocol):
    """One way to compute CAPO."""

    def stages(self, batch: Batch) -> Stages: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Naive(NaiveFilter):
    def stages(self, batch: Batch) -> Stages:
        return {
            "evaluate": lambda: self.evaluate(*_arguments(batch)),
            "accumulate": self.accumulate,
            "update": self.update,
        }


class _Filter(CapoFilter):
    def stages(self, batch: Batch) -> Stages:
        return {"evaluate": lambda: self.evaluate(*_arguments(batch)), "step": self.step}


class Kind(NamedTuple):
    """A contender by name."""

    key: str
    label: str
    build: Callable[[Workload, CapoConfig, torch.dtype], Contender]
    """Takes the dtype of hidden states and logits."""
    missing: Callable[[Workload], str | None] = lambda workload: None
    """Why it cannot run on the workload's device, or None."""
    tensor_bytes: Callable[[Workload, int], int] = lambda workload, tokens: 0
    """Scratch memory known beforehand, for a number of tokens."""


def _arguments(batch: Batch) -> tuple[Any, ...]:
    return (
        batch.hidden_states, batch.logits, batch.actions, batch.advantages, batch.response_mask, LEARNING_RATE,
    )  # fmt: skip


def _naive(workload: Workload, config: CapoConfig, dtype: torch.dtype) -> Contender:
    return _Naive(config, workload.rows, workload.hidden_size, device=workload.device, dtype=dtype)


def _filter(kernels: str) -> Callable[[Workload, CapoConfig, torch.dtype], Contender]:
    def build(workload: Workload, config: CapoConfig, dtype: torch.dtype) -> Contender:
        return _Filter(config, workload.rows, workload.hidden_size, device=workload.device, kernels=kernels)

    return build


def _needs_a_gpu(workload: Workload) -> str | None:
    return None if workload.device == "cuda" else "needs a GPU"


NAIVE = Kind(
    "naive", "(a) as published", _naive,
    tensor_bytes=lambda workload, n: NaiveFilter.nbytes(n, workload.top_k, workload.hidden_size, workload.model_dtype),
)  # fmt: skip
TORCH = Kind("torch", "(b) chunked torch", _filter("torch"))
FUSED = Kind("triton", "(c) fused", _filter("triton"), missing=_needs_a_gpu)
KINDS = (NAIVE, TORCH, FUSED)
LABELS = {kind.key: kind.label for kind in KINDS}
