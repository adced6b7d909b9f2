# SPDX-License-Identifier: Apache-2.0
"""All contenders must give the same numbers before any is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from capo_verl.experiments.benchmark.batch import Batch, make_batch
from capo_verl.experiments.benchmark.contenders import (
    FUSED,
    NAIVE,
    NAIVE_REUSED,
    TORCH,
    Contender,
    Kind,
    accept_all,
)
from capo_verl.experiments.benchmark.workload import Workload

TOKENS = 256
SHIFT_TOLERANCE = 1e-4
"""Tolerance of m_H and m_F in float32, as a share of the value or the median, the larger."""
MOMENT_TOLERANCE = 1e-5
"""Tolerance of the moments, as a share of the largest element."""


class DisagreementError(RuntimeError):
    """Two contenders computed different numbers."""


def check_agreement(workload: Workload) -> dict[str, float]:
    """Evaluate one batch and make one step with every contender that runs here.

    All start from the same moments.

    In float32, where the published formulation is exact enough to be a reference; if the model's
    dtype is another, the kernels of CapoFilter are compared with each other in that dtype as well.
    The thresholds reject about half of the tokens.

    Returns:
        What was compared -> the largest deviation.

    Raises:
        DisagreementError: if a deviation exceeds its tolerance or a token is accepted by one
            contender only.
    """
    deviations = _compare([NAIVE, NAIVE_REUSED, TORCH, FUSED], workload, torch.float32)
    if workload.model_dtype != torch.float32:
        deviations |= _compare([TORCH, FUSED], workload, workload.model_dtype)
    return deviations


def _compare(kinds: Sequence[Kind], workload: Workload, dtype: torch.dtype) -> dict[str, float]:
    kinds = [kind for kind in kinds if kind.missing(workload) is None]
    if len(kinds) < 2:
        return {}
    warm_up, batch = (make_batch(workload, TOKENS, seed, dtype) for seed in (1, 2))
    if NAIVE in kinds:
        batch = replace(batch, response_mask=_unique_support(batch, workload.top_k))

    reference = kinds[0].build(workload, accept_all(workload), dtype)
    for _ in range(2):
        for run in reference.stages(warm_up).values():
            run()
    # Copies: a filter may go on writing to the tensors of its state.
    start = {
        k: v.clone() if isinstance(v, Tensor) else v for k, v in reference.state_dict().items()
    }
    out = reference.stages(batch)["evaluate"]()
    config = replace(
        accept_all(workload), policy_shift_max=_between(out.policy_shift),
        objective_shift_max=_between(out.objective_shift.abs()), objective_shift_min="symmetric",
    )  # fmt: skip
    del reference, out

    expected = _outcome(kinds[0].build(workload, config, dtype), start, batch)
    deviations = {}
    for kind in kinds[1:]:
        found = _outcome(kind.build(workload, config, dtype), start, batch)
        name = f"{kind.key} against {kinds[0].key}, {str(dtype).removeprefix('torch.')}"
        differ = int((found["accepted"] != expected["accepted"]).sum())
        if differ:
            raise DisagreementError(
                f"{name}: {differ} of {TOKENS} tokens are accepted by one of the two only"
            )
        for what, tolerance in (
            ("objective_shift", SHIFT_TOLERANCE), ("policy_shift", SHIFT_TOLERANCE),
            ("exp_avg", MOMENT_TOLERANCE), ("exp_avg_sq", MOMENT_TOLERANCE),
        ):  # fmt: skip
            floor = (
                expected[what].abs().median()
                if what.endswith("shift")
                else expected[what].abs().max()
            )
            difference = (found[what] - expected[what]).abs() / expected[what].abs().clamp(
                min=floor
            )
            largest = difference.max().item()
            if not largest <= tolerance:
                raise DisagreementError(
                    f"{name}: {what} differs by {largest:.2g}, more than {tolerance:g}"
                )
            deviations[f"{name}: {what}"] = largest
    return deviations


def _unique_support(batch: Batch, top_k: int) -> Tensor:
    """Tokens whose k-th logit is larger than the next, ``[N]`` bool.

    Of equal ones the published formulation takes any.
    """
    if top_k == batch.logits.shape[1]:
        return batch.response_mask
    top = batch.logits.topk(top_k + 1).values
    return top[:, -2] > top[:, -1]


def _outcome(contender: Contender, start: dict[str, object], batch: Batch) -> dict[str, Tensor]:
    contender.load_state_dict(start)
    stages = contender.stages(batch)
    out = stages.pop("evaluate")()
    for run in stages.values():
        run()
    state = contender.state_dict()
    return {
        "objective_shift": out.objective_shift, "policy_shift": out.policy_shift,
        "accepted": out.accepted, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"],
    }  # fmt: skip


def _between(values: Tensor) -> float:
    """A threshold at about the 70th percentile, in the widest gap there.

    No contender is within rounding of it.
    """
    ordered = values.double().sort().values
    middle = ordered[int(0.6 * len(ordered)) : int(0.8 * len(ordered))]
    widest = int(middle.diff().argmax())
    return float((middle[widest] + middle[widest + 1]) / 2)
