# SPDX-License-Identifier: Apache-2.0
"""Contenders: the formulation as published in two forms, CapoFilter with either kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from capo_verl.config import CapoConfig
from capo_verl.core.chunks import chunk_slices
from capo_verl.core.filter import CapoFilter
from capo_verl.experiments.benchmark.batch import LEARNING_RATE, Batch
from capo_verl.experiments.benchmark.naive import BATCH_TOKENS, NaiveFilter
from capo_verl.experiments.benchmark.workload import Workload

Stages = dict[str, Callable[[], Any]]
"""Name of a stage -> what it runs, in order.

``evaluate`` comes first and returns m_H, m_F and the accepted tokens. Names that begin with it
belong to it: ``evaluate 2`` is the second batch of tokens, of a contender that cannot take them all
at once.
"""


def accept_all(workload: Workload) -> CapoConfig:
    """The most work for the moments: no token is rejected."""
    return CapoConfig(
        top_k=workload.top_k,
        policy_shift_max=None,
        objective_shift_max=None,
        objective_shift_min=None,
    )


class Contender(Protocol):
    """One way to compute CAPO."""

    def stages(self, batch: Batch) -> Stages: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Naive(NaiveFilter):
    def stages(self, batch: Batch) -> Stages:
        stages: Stages = {}
        for i, part in enumerate(chunk_slices(len(batch.actions), BATCH_TOKENS)):
            number = f" {i + 1}" if i else ""
            arguments = _arguments(batch.part(part))
            stages[f"evaluate{number}"] = partial(self.evaluate, *arguments)
            stages[f"accumulate{number}"] = self.accumulate
        return {**stages, "update": self.update}


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
    """Reason that it cannot run on the workload's device, or None."""
    tensor_bytes: Callable[[Workload, int], int] = lambda workload, tokens: 0
    """Scratch memory known beforehand, for a number of tokens."""


def _arguments(batch: Batch) -> tuple[Any, ...]:
    return (
        batch.hidden_states, batch.logits, batch.actions, batch.advantages, batch.response_mask,
        LEARNING_RATE,
    )  # fmt: skip


def _naive(key: str, label: str, reuse_temporaries: bool) -> Kind:
    def build(workload: Workload, config: CapoConfig, dtype: torch.dtype) -> Contender:
        return _Naive(
            config, workload.rows, workload.hidden_size, device=workload.device, dtype=dtype,
            reuse_temporaries=reuse_temporaries,
        )  # fmt: skip

    def tensor_bytes(workload: Workload, tokens: int) -> int:
        return NaiveFilter.nbytes(
            tokens, workload.top_k, workload.hidden_size, workload.model_dtype, reuse_temporaries
        )

    return Kind(key, label, build, tensor_bytes=tensor_bytes)


def _filter(kernels: str) -> Callable[[Workload, CapoConfig, torch.dtype], Contender]:
    def build(workload: Workload, config: CapoConfig, dtype: torch.dtype) -> Contender:
        return _Filter(
            config, workload.rows, workload.hidden_size, device=workload.device, kernels=kernels
        )

    return build


def _needs_a_gpu(workload: Workload) -> str | None:
    return None if workload.device == "cuda" else "needs a GPU"


NAIVE = _naive("naive", "(a) as published", reuse_temporaries=False)
NAIVE_REUSED = _naive("naive_reused", "(a') temporaries reused", reuse_temporaries=True)
TORCH = Kind("torch", "(b) chunked torch", _filter("torch"))
FUSED = Kind("triton", "(c) fused", _filter("triton"), missing=_needs_a_gpu)
KINDS = (NAIVE, NAIVE_REUSED, TORCH, FUSED)
LABELS = {kind.key: kind.label for kind in KINDS}
