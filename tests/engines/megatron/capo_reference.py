# SPDX-License-Identifier: Apache-2.0
"""CAPO training with Hugging Face + the filter in float64 + torch's AdamW, and how an engine's
training compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import curvature_penalty
from tests.cpu.hugging_face import load_model, merged_weights
from tests.engines.megatron.capo_cases import ADVANTAGES, CLIP, KNOBS, LR, STEPS, recorded
from tests.helpers.recording import RecordedBatch


@dataclass
class Step:
    loss: float
    grad_norm: float
    accepted: int
    tokens: int
    policy_shift: torch.Tensor
    batch_policy_shift: tuple[float, float]


@dataclass
class Reference:
    steps: list[Step]
    weights: dict[str, torch.Tensor]


def make_reference(
    path: str,
    temperature: float,
    adapter: str | None = None,
    knobs: dict[str, Any] = KNOBS,
    batch: RecordedBatch | None = None,
    images: Sequence[dict[str, torch.Tensor]] | None = None,
) -> Reference:
    """The same training with none of verl's code or its backends'; the filter sees float64.

    Args:
        batch: another batch, of the same advantages.
        images: further arguments of the model for each of its sequences.
        knobs: of CAPO.
        adapter: directory of a LoRA adapter, which is trained in place of the model; the weights
            are the merged ones.
    """
    trained = load_model(path, adapter)
    model = trained if adapter is None else trained.get_base_model()
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    text = model.config.get_text_config()
    capo = CapoFilter(CapoConfig(**knobs), text.vocab_size, text.hidden_size)
    batch = batch or recorded()
    ids, prompts, old_log_probs = batch.ids, batch.prompts, batch.old_log_probs
    steps = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, shifts, accepted_count, tokens = torch.zeros(()), [], 0, 0
        for i, row in enumerate(ids):
            seen = {} if images is None else images[i]
            hidden = model.model(row[None], **seen).last_hidden_state[0, prompts[i] - 1 : -1]
            logits = model.lm_head(hidden) / temperature
            actions = row[prompts[i] :]
            wide = logits[None].double()
            out = capo.evaluate(
                hidden[None].double(), wide, actions[None], torch.tensor([[ADVANTAGES[i]]]),
                torch.ones(1, len(actions)), LR
            )  # fmt: skip
            accepted, weights = out.accepted[0].float(), out.weights[0].float()
            log_probs = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
            per_token = -ADVANTAGES[i] * weights * (log_probs - old_log_probs[i]).exp()
            if out.penalty_terms is not None:
                per_token = per_token + curvature_penalty(wide, out.penalty_terms)[0].float()
            loss = loss + (per_token * accepted).sum() / (accepted.sum() + 1e-8) / len(ids)
            shifts.append(out.policy_shift[0])
            accepted_count, tokens = (
                accepted_count + int(out.in_trust_region.sum()),
                tokens + len(actions),
            )
        before, after = capo.batch_shifts()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
        optimizer.step()
        capo.step()
        steps.append(
            Step(
                float(loss.detach()),
                norm,
                accepted_count,
                tokens,
                torch.cat(shifts),
                (float(before.policy), float(after.policy)),
            )
        )
    return Reference(steps, merged_weights(trained))


def check_meaningful(reference: Reference) -> None:
    """Some tokens go, and no decision hangs on rounding."""
    for step in reference.steps:
        assert 0 < step.accepted < step.tokens
        assert float((step.policy_shift / KNOBS["policy_shift_max"] - 1).abs().min()) > 1e-3


def check_training(ranks: list[dict[str, Any]], dp: int, expected: Reference) -> None:
    """What the ranks returned from ``train`` against the reference: decisions, metrics, losses,
    weights.
    """
    reports = [rank["reports"] for rank in ranks if rank["reports"]]
    assert len(reports) == dp
    for at, step in enumerate(expected.steps):
        mine = [report[at] for report in reports]
        metrics = {name: value[0] for name, value in mine[0].items() if name.startswith("capo/")}
        assert metrics["capo/accepted_tokens"] == step.accepted
        assert metrics["capo/rejection_rate"] == pytest.approx(1 - step.accepted / step.tokens)
        assert metrics["capo/policy_shift_mean"] == pytest.approx(
            float(step.policy_shift.mean()), rel=1e-3
        )
        assert metrics["capo/policy_shift_max"] == pytest.approx(
            float(step.policy_shift.max()), rel=1e-3
        )
        batch = [metrics[f"capo/batch_policy_shift_{when}"] for when in ("before", "after")]
        assert batch == pytest.approx(step.batch_policy_shift, rel=2e-3)
        assert float(mine[0]["grad_norm"]) == pytest.approx(step.grad_norm, rel=1e-3)
        assert sum(report["loss"] for report in mine) / dp == pytest.approx(
            step.loss, rel=1e-3, abs=1e-5
        )
    for rank in ranks:
        for name, weight in expected.weights.items():
            # Adam turns the rounding of a gradient near zero into a share of its step, 1e-2; such
            # elements are few.
            difference = (rank["weights"][name] - weight).abs()
            assert float(difference.max()) < 2e-3 and float(difference.mean()) < 5e-6


def check_untouched(ours: list[dict], verls: list[dict]) -> None:
    """Without the switch: verl's own training bit for bit, and nothing of CAPO in what is
    reported.
    """
    for a, b in zip(ours, verls, strict=True):
        assert a["weights"].keys() == b["weights"].keys()
        assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
        assert [r["loss"] for r in a["reports"]] == [r["loss"] for r in b["reports"]]
        assert a["state"] is None and not any(
            "capo/" in name for report in a["reports"] for name in report
        )
