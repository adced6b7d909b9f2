# SPDX-License-Identifier: Apache-2.0
"""One real optimizer step, with everything predicted before it and measured after it, token by
token.

How deep training goes is varied without training again: every optimizer here updates each parameter
from its own gradient, so a step that moves only the upper layers is the full step with the lower
layers put back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capo_verl.commands.calibrate import measured
from capo_verl.commands.calibrate.policy import DEPTHS, Policy
from capo_verl.commands.calibrate.predicted import Predictions
from capo_verl.commands.calibrate.rollouts import Rollouts


@dataclass(frozen=True)
class StepMeasurement:
    """Measurements of the N response tokens of one step."""

    tokens: dict[str, np.ndarray]
    """``[N]`` float64. Known before: ``sequence, action, advantage, log_prob, entropy, hidden``
    (squared norm), ``in_support, policy_shift, policy_shift_exact, policy_shift_sgd,
    objective_shift``; with the LM head's real step: ``head_step``.
    """
    kl: dict[str, np.ndarray]
    """Depth -> ``[N]``, the true KL(old || new), nats."""
    objective: dict[str, np.ndarray]
    """Depth -> ``[N]``, ``A (pi_new / pi_old - 1)``: the change of the token's surrogate objective,
    which m_H predicts.
    """
    batch: dict[str, float]
    """Means over tokens per sequence, then over sequences: predicted ``policy_shift,
    policy_shift_exact, objective_shift, head_step``; true ``kl/DEPTH, objective/DEPTH``; also
    ``kl_token_mean/DEPTH``, ``gradient_norm``, ``learning_rate``.
    """


def measure_step(
    policy: Policy,
    rollouts: Rollouts,
    optimizer: torch.optim.Optimizer,
    predictions: Predictions,
    *,
    depths: Sequence[str] = DEPTHS,
    aggregation: str = "seq-mean-token-mean",
    max_gradient_norm: float | None = 1.0,
    rows_per_pass: int | None = None,
) -> StepMeasurement:
    """Train one step on ``rollouts`` with the policy-gradient loss ``-A log pi`` and measure it.
    The step stays.

    Args:
        optimizer: elementwise (SGD, Adam, AdamW), over ``policy.parameters``, with one learning
            rate.
        predictions: whose moments move with the step.
        depths: which of :data:`DEPTHS` to measure.
        aggregation: of the loss, see :meth:`Rollouts.token_weights`.
        max_gradient_norm: clips the gradient's norm over all parameters; None = not.
        rows_per_pass: sequences per forward pass. Default: all.

    Raises:
        ValueError: for an unknown depth or aggregation.
        FloatingPointError: if the gradient is not finite.
    """
    parts = _parts(rollouts, rows_per_pass)
    lr = float(optimizer.param_groups[0]["lr"])
    norm, hidden = _gradient(policy, rollouts, parts, optimizer, aggregation, max_gradient_norm)
    head, actions = _head(policy), rollouts.actions
    columns, shifts = predictions.evaluate(rollouts, hidden, lr)
    known = measured.before(hidden, head, actions)

    old = {name: p.detach().clone() for name, p in policy.parameters.items()}
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    predictions.step()

    new_head = _head(policy)
    after = _hidden_at_depths(policy, parts, depths, hidden, old)
    found = measured.outcomes(hidden, head, after, new_head, actions)
    sequence, _ = rollouts.positions
    advantage = rollouts.advantages.double()[sequence]
    tokens = {
        "sequence": sequence.double(),
        "action": actions.double(),
        "advantage": advantage,
        **known,
        "head_step": measured.head_step(hidden, head, new_head),
    }
    kl = {d: o.kl for d, o in found.items()}
    objective = {d: advantage * o.log_ratio.expm1() for d, o in found.items()}
    means = {f"kl/{d}": x for d, x in kl.items()} | {
        f"objective/{d}": x for d, x in objective.items()
    }
    batch = {
        **shifts,
        "head_step": sequence_mean(tokens["head_step"], sequence),
        **{name: sequence_mean(x, sequence) for name, x in means.items()},
        **{f"kl_token_mean/{d}": float(x.mean()) for d, x in kl.items()},
        "gradient_norm": float(norm),
        "learning_rate": lr,
    }
    return StepMeasurement(
        {**{name: _numpy(x) for name, x in tokens.items()}, **columns},
        {d: _numpy(x) for d, x in kl.items()},
        {d: _numpy(x) for d, x in objective.items()},
        batch,
    )


def train_step(
    policy: Policy,
    rollouts: Rollouts,
    optimizer: torch.optim.Optimizer,
    predictions: Predictions,
    *,
    aggregation: str = "seq-mean-token-mean",
    max_gradient_norm: float | None = 1.0,
    rows_per_pass: int | None = None,
) -> None:
    """The same step without measuring it, for what lies between two measurements.

    Arguments as for :func:`measure_step`.
    """
    parts = _parts(rollouts, rows_per_pass)
    _, hidden = _gradient(policy, rollouts, parts, optimizer, aggregation, max_gradient_norm)
    predictions.learn(rollouts, hidden, float(optimizer.param_groups[0]["lr"]))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    predictions.step()


def sequence_mean(values: Tensor, sequence: Tensor) -> float:
    """Mean over tokens per sequence, then over the sequences that have tokens; both ``[N]``."""
    counts = torch.bincount(sequence)
    sums = torch.zeros(len(counts), dtype=values.dtype, device=values.device).index_add_(
        0, sequence, values
    )
    return float((sums[counts > 0] / counts[counts > 0]).mean())


def _parts(rollouts: Rollouts, rows: int | None) -> list[Rollouts]:
    """Parts with a response each; in the order of the batch, so that their tokens join to its
    tokens.
    """
    n = len(rollouts.input_ids)
    parts = [slice(i, i + (rows or n)) for i in range(0, n, rows or n)]
    return [rollouts.part(part) for part in parts if rollouts.response_mask[part].any()]


def _gradient(
    policy: Policy, rollouts: Rollouts, parts: Sequence[Rollouts], optimizer: torch.optim.Optimizer,
    aggregation: str, max_norm: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Put the clipped gradient of the loss in place; its norm before clipping, and the LM head's
    inputs ``[N, H]``.
    """
    kept = []
    weights = rollouts.token_weights(aggregation).split([len(part.actions) for part in parts])
    optimizer.zero_grad(set_to_none=False)
    for part, weight in zip(parts, weights, strict=True):
        hidden = policy.hidden(part)
        _loss(policy, part, hidden, weight).backward()
        kept.append(hidden.detach())
    norm: Tensor = torch.nn.utils.clip_grad_norm_(
        list(policy.parameters.values()), float("inf") if max_norm is None else max_norm
    )
    if not torch.isfinite(norm):
        raise FloatingPointError(
            "the gradient is not finite; lower the learning rate, or check the model"
        )
    return norm, torch.cat(kept)


def _loss(policy: Policy, part: Rollouts, hidden: Tensor, weight: Tensor) -> Tensor:
    log_probs = policy.head(hidden).log_softmax(-1)
    taken = log_probs.gather(-1, part.actions[:, None])[:, 0]
    sequence, _ = part.positions
    return -(weight.to(taken.dtype) * part.advantages.to(taken.dtype)[sequence] * taken).sum()


@torch.no_grad()
def _hidden(policy: Policy, parts: Sequence[Rollouts]) -> Tensor:
    return torch.cat([policy.hidden(part) for part in parts])


def _head(policy: Policy) -> measured.Head:
    weight, bias = policy.head.weight.detach().clone(), policy.head.bias
    return measured.Head(weight, None if bias is None else bias.detach().clone())


@torch.no_grad()
def _hidden_at_depths(
    policy: Policy,
    parts: Sequence[Rollouts],
    depths: Sequence[str],
    hidden: Tensor,
    old: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The LM head's inputs after a step that goes so deep; a tied embedding moves with ``all``
    only.
    """
    found = {"all": _hidden(policy, parts)} if "all" in depths else {}
    partial = [d for d in depths if d not in ("head", "all")]
    if partial:
        new = {name: p.detach().clone() for name, p in policy.parameters.items()}
        for depth in partial:
            for name, source in _choose(policy, depth, old, new):
                policy.parameters[name].copy_(source)
            found[depth] = _hidden(policy, parts)
        for name, p in policy.parameters.items():
            p.copy_(new[name])
    return {d: hidden if d == "head" else found[d] for d in depths}


def _choose(
    policy: Policy, depth: str, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name in policy.parameters:
        # The body reads a shared weight as its embedding; the LM head's own is taken apart from the
        # body.
        moves = policy.moves(name, depth) and not (policy.tied and policy.is_head(name))
        yield name, (new if moves else old)[name]


def _numpy(x: Tensor) -> np.ndarray:
    array: np.ndarray = x.double().cpu().numpy()
    return array
