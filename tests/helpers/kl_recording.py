# SPDX-License-Identifier: Apache-2.0
"""The recorded batch trained under a KL budget by a float64 Hugging Face model: what every engine
and layout has to measure.

Nothing of verl, Megatron or ``capo_verl`` runs here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from capo_verl.cpu.expert_weights import one_by_one
from tests.helpers.recording import BETAS, EPS, RecordedBatch, float64_model

DELTA, ETA, STEPS = 2e-4, 0.5, 4
LEAST = 0.01
"""Least rate, in multiples of the scheduled one: steps whose KL float32 measures exactly."""
TRIES = 3
"""How often a step is shortened at most: KL is not quadratic far from the old policy."""
ADAM_LR, SGD_LR, CLIP = 1e-3, 0.3, 1.0


@dataclass
class KLStep:
    """One optimizer step: what was measured after it, and its learning rate."""

    mean: float
    p99: float
    rate: float
    kept: float
    whole: float
    """The mean before the step back."""
    k3: float
    """Of the taken tokens, mean."""


@dataclass
class KLRecording:
    steps: list[KLStep]
    weights: dict[str, np.ndarray]


def record_kl(
    path: str,
    probed: tuple[int, ...],
    temperature: float = 1.0,
    padded_rows: int = 0,
    optimizer: str = "adam",
    line_search: float | None = None,
    least: float = LEAST,
    steps: int = STEPS,
    replay: bool = False,
) -> KLRecording:
    """
    Args:
        probed: sequences on which the KL is measured.
        optimizer: ``adam`` as the Megatron engine is set up in its tests, or ``sgd``.
        line_search: factor of the budget from which a step is shortened to meet it.
        least: multiple of the learning rate that a rate is not below, after the first.
        replay: tokens go to the experts that the first policy chose, in every pass; probe all.
    """
    batch = RecordedBatch.make()
    model = float64_model(path, padded_rows, len(batch.ids) if replay else None)
    parameters = [*model.parameters(), model.padding]
    base = ADAM_LR if optimizer == "adam" else SGD_LR
    trained = (
        torch.optim.AdamW(parameters, lr=base, betas=BETAS, eps=EPS, weight_decay=0.0)
        if optimizer == "adam"
        else torch.optim.SGD(parameters, lr=base)
    )
    rates, kls, curvature, found = [1e-7], [], None, []
    for _ in range(steps):
        with torch.no_grad():
            old, before = (
                _policy(model, batch, probed, temperature),
                [p.clone() for p in parameters],
            )
        trained.zero_grad()
        _loss(model, batch, temperature).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        trained.param_groups[0]["lr"] = rates[-1]
        trained.step()
        kept = 1.0
        with torch.no_grad():
            kl, k3 = _compare(old, _policy(model, batch, probed, temperature))
            whole = float(kl.mean())
            for _ in range(TRIES if line_search is not None else 0):
                if kl.mean() <= line_search * DELTA:
                    break
                keep = (DELTA / float(kl.mean())) ** 0.5
                kept *= keep
                for p, q in zip(parameters, before, strict=True):
                    p.copy_(q + keep * (p - q))
                kl, k3 = _compare(old, _policy(model, batch, probed, temperature))
        kls.append(whole)
        if len(kls) > 1:  # the first is the floor of what can be measured
            seen = (whole - kls[0]) / rates[-1] ** 2
            assert whole > 3 * kls[0]
            weight = max(ETA, 1 / (len(kls) - 1))
            curvature = seen if curvature is None else curvature + weight * (seen - curvature)
            rates.append(max(least * base, (DELTA / curvature) ** 0.5))
        else:
            rates.append(max(least * base, 1e-6))
        p99 = np.sort(kl.numpy())[round(0.99 * (len(kl) - 1))]
        found.append(
            KLStep(float(kl.mean()), float(p99), rates[len(kls) - 1], kept, whole, float(k3.mean()))
        )
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    return KLRecording(found, one_by_one(weights))


def log_probs_of(path: str, weights: dict[str, torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Log-probabilities of the taken tokens of all responses, float64, with the given weights in
    place of the model's.
    """
    batch, model = RecordedBatch.make(), float64_model(path)
    if weights is not None:
        model.load_state_dict(
            {name: weight.double() for name, weight in weights.items()}, strict=False
        )
    with torch.no_grad():
        return [
            model(ids[None])
            .logits[0, start - 1 : -1]
            .log_softmax(-1)
            .gather(-1, ids[start:, None])[:, 0]
            for ids, start in zip(batch.ids, batch.prompts, strict=True)
        ]


def mean_k3(old: list[torch.Tensor], new: list[torch.Tensor], sequences: tuple[int, ...]) -> float:
    """Over the response tokens that count of some sequences."""
    masks = RecordedBatch.make().response_mask
    r = torch.cat([(new[i] - old[i])[masks[i].bool()] for i in sequences])
    return float((r.exp() - 1 - r).mean())


Policy = tuple[torch.Tensor, torch.Tensor]
"""Log-probabilities ``[tokens, V]`` of the response tokens that count, and of those taken
``[tokens]``.
"""


def _policy(
    model: torch.nn.Module, batch: RecordedBatch, probed: tuple[int, ...], temperature: float
) -> Policy:
    rows, taken = [], []
    for i in probed:
        ids, start, mask = batch.ids[i], batch.prompts[i], batch.response_mask[i].bool()
        log_p = (model(ids[None]).logits[0, start - 1 : -1] / temperature).log_softmax(-1)[mask]
        rows.append(log_p)
        taken.append(log_p.gather(-1, ids[start:][mask][:, None])[:, 0])
    return torch.cat(rows), torch.cat(taken)


def _compare(old: Policy, new: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    r = new[1] - old[1]
    return (old[0].exp() * (old[0] - new[0])).sum(-1), r.exp() - 1 - r


def _loss(model: torch.nn.Module, batch: RecordedBatch, temperature: float) -> torch.Tensor:
    """Seq-mean-token-mean of ``-A ratio``, as ``tests/helpers/recording.py`` has it, without a
    filter.
    """
    loss = torch.zeros((), dtype=torch.float64)
    for i, ids in enumerate(batch.ids):
        mask, start = batch.response_mask[i].double(), batch.prompts[i]
        hidden = model.model(ids[None]).last_hidden_state[0, start - 1 : -1]
        logits = hidden @ torch.cat([model.lm_head.weight, model.padding]).T / temperature
        log_probs = logits.log_softmax(-1).gather(-1, ids[start:, None])[:, 0]
        per_token = (
            -batch.advantages[i].double() * (log_probs - batch.old_log_probs[i].double()).exp()
        )
        loss = loss + (per_token * mask).sum() / (mask.sum() + 1e-8) / len(batch.ids)
    return loss
