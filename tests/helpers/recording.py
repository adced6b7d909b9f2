# SPDX-License-Identifier: Apache-2.0
"""One batch, recorded once: what a float64 model and the naive oracle make of it over a few
optimizer steps.

Every layout replays the same batch and is compared with this. Nothing of verl, Megatron or
``CapoFilter`` runs here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from capo_verl import CapoConfig
from capo_verl.cpu.expert_weights import one_by_one
from tests.helpers.batches import inside
from tests.helpers.experts import in_float64
from tests.helpers.oracle import Oracle, make_token

PROMPTS, RESPONSES = (4, 3, 5, 4, 2, 3, 6, 3), (9, 7, 11, 3, 6, 5, 8, 10)
MASKED_OUT = ((0, 4), (2, 0), (2, 7), (6, 5))
"""Response positions that are not the policy's own (tool output): they carry an advantage and no
loss.
"""
LEARNING_RATES, CLIP = (1e-2, 8e-4), 1.0
"""Of the two optimizer steps.

Before the first one P(g) = g, and the shifts are smaller: the steps share thresholds.
"""
BETAS, EPS = (0.8, 0.95), 1e-3
"""Of the real optimizer.

A large epsilon, because Adam otherwise turns the rounding of a gradient near zero into a step.
"""
KNOBS: dict[str, Any] = {"top_k": 20, "policy_shift_max": 9e-4, "objective_shift_max": 5e-2}


@dataclass
class RecordedBatch:
    """Per sequence: token ids ``[prompt + response]``; advantages, response mask and old log-probs
    ``[response]``.

    Advantages are float32 and differ from token to token, so that an advantage says which token it
    belongs to.
    """

    ids: list[torch.Tensor]
    prompts: tuple[int, ...]
    advantages: list[torch.Tensor]
    response_mask: list[torch.Tensor]
    old_log_probs: list[torch.Tensor]

    @classmethod
    def make(cls, seed: int = 3) -> RecordedBatch:
        generator = torch.Generator().manual_seed(seed)
        ids = [
            torch.randint(4, 100, (p + r,), generator=generator)
            for p, r in zip(PROMPTS, RESPONSES, strict=True)
        ]
        masks = [torch.ones(r, dtype=torch.int64) for r in RESPONSES]
        for i, t in MASKED_OUT:
            masks[i][t] = 0
        advantages = [
            (-1) ** i * (0.5 + torch.rand(r, generator=generator)) for i, r in enumerate(RESPONSES)
        ]
        assert len(torch.cat(advantages).unique()) == sum(RESPONSES)
        return cls(ids, PROMPTS, advantages, masks,
                   [-4.6 + 0.1 * torch.randn(r,
                       generator=generator) for r in RESPONSES])  # fmt: skip

    @property
    def tokens(self) -> int:
        return int(torch.cat(self.response_mask).sum())


@dataclass
class RecordedStep:
    """One optimizer step in float64; per-token arrays ``[tokens]`` follow the mask, sequence by
    sequence.
    """

    hidden_states: np.ndarray
    logits: np.ndarray
    """After temperature."""
    actions: np.ndarray
    advantages: np.ndarray
    objective_shift: np.ndarray
    policy_shift: np.ndarray
    accepted: np.ndarray
    batch_shifts: tuple[tuple[float, float], tuple[float, float]]
    """(m_H, m_F) of all tokens, and of the accepted ones, as one batch."""
    loss: float
    grad_norm: float
    gradients: dict[str, np.ndarray]


@dataclass
class Recording:
    batch: RecordedBatch
    steps: list[RecordedStep]
    weights: dict[str, np.ndarray]
    """After the last step."""

    @property
    def margin(self) -> float:
        """Smallest relative distance of any shift to its threshold: no decision may hang on
        rounding.
        """
        bounds = [
            ("policy_shift", KNOBS["policy_shift_max"]),
            ("objective_shift", KNOBS["objective_shift_max"]),
        ]
        return min(
            float(np.abs(np.abs(getattr(step, name)) / bound - 1).min())
            for step in self.steps
            for name, bound in bounds
        )


def float64_model(path: str, padded_rows: int = 0, passes: int | None = None) -> Any:
    """The Hugging Face model with float64 throughout, and ``padded_rows`` rows of zeros below the
    LM head.

    Megatron pads the vocabulary for tensor parallelism, and its softmax counts the padding.

    Args:
        passes: forward passes of a model with experts whose routes all later ones repeat.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="sdpa", experts_implementation="eager"
    )
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # computes in float32 whatever it is given
            module.forward = _rms_norm(module)
        elif type(module).__name__.endswith("TopKRouter"):
            module.forward = in_float64(module, passes)
    model.padding = torch.zeros(
        padded_rows, model.config.hidden_size, dtype=torch.float64, requires_grad=True
    )
    return model


def _rms_norm(module: Any) -> Any:
    return lambda x: torch.nn.functional.rms_norm(
        x, module.weight.shape, module.weight, module.variance_epsilon
    )


def record(
    path: str, temperature: float = 1.0, padded_rows: int = 0, replay: bool = False
) -> Recording:
    """Train two steps on the batch: forward, oracle, filtered loss, backward, clipping, Adam,
    moments.

    Args:
        replay: tokens go to the experts that the first policy chose, in both steps.
    """
    batch = RecordedBatch.make()
    model = float64_model(path, padded_rows, len(batch.ids) if replay else None)
    config = CapoConfig(**KNOBS)
    parameters = dict(model.named_parameters())
    trained = [*parameters.values(), model.padding]
    optimizer = torch.optim.AdamW(trained, betas=BETAS, eps=EPS, weight_decay=0.0)
    oracle = Oracle(
        model.config.vocab_size,
        model.config.hidden_size,
        top_k=KNOBS["top_k"],
        betas=BETAS,
        eps=EPS,
    )
    steps = []
    for learning_rate in LEARNING_RATES:
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.zero_grad()
        seen: list[list[Any]] = []
        loss = torch.zeros((), dtype=torch.float64)
        for i, ids in enumerate(batch.ids):
            mask, start = batch.response_mask[i].bool(), batch.prompts[i]
            hidden = model.model(ids[None]).last_hidden_state[0, start - 1 : -1]
            logits = hidden @ torch.cat([model.lm_head.weight, model.padding]).T / temperature
            actions, advantages = ids[start:], batch.advantages[i].double()
            rows = _evaluate(
                oracle,
                config,
                learning_rate,
                hidden[mask],
                logits[mask],
                actions[mask],
                advantages[mask],
            )
            seen.append(rows)
            accepted = torch.zeros(len(mask), dtype=torch.float64)
            accepted[mask] = torch.tensor([row["accepted"] for row in rows], dtype=torch.float64)
            log_probs = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
            per_token = -advantages * (log_probs - batch.old_log_probs[i].double()).exp()
            loss = loss + (per_token * accepted).sum() / (accepted.sum() + 1e-8) / len(batch.ids)
        loss.backward()
        gradients = one_by_one({name: p.grad.numpy().copy() for name, p in parameters.items()})
        grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, CLIP))
        steps.append(_step(oracle, learning_rate, seen, float(loss.detach()), grad_norm, gradients))
        optimizer.step()
        oracle.update([row["token"] for rows in seen for row in rows if row["accepted"]])
    weights = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    return Recording(batch, steps, one_by_one(weights))


def _evaluate(
    oracle: Oracle, config: CapoConfig, learning_rate: float, hidden: torch.Tensor,
    logits: torch.Tensor, actions: torch.Tensor, advantages: torch.Tensor,
) -> list[dict[str, Any]]:  # fmt: skip
    rows = []
    for h, z, action, advantage in zip(
        hidden.detach().numpy(), logits.detach().numpy()[:, : oracle.vocab_size], actions.tolist(),
        advantages.tolist(), strict=True,
    ):  # fmt: skip
        token = make_token(h, z, action, advantage, oracle.top_k)
        m_h, m_f = oracle.token_shifts(token, learning_rate)
        rows.append(
            {"token": token, "hidden_states": h, "logits": z, "actions": action,
                "advantages": advantage,
             "objective_shift": m_h, "policy_shift": m_f, "accepted": inside(config, m_h, m_f)}
        )  # fmt: skip
    return rows


def _step(
    oracle: Oracle,
    learning_rate: float,
    seen: list[list[Any]],
    loss: float,
    grad_norm: float,
    gradients: dict[str, np.ndarray],
) -> RecordedStep:
    rows = [row for sequence in seen for row in sequence]
    columns = (
        "hidden_states",
        "logits",
        "actions",
        "advantages",
        "objective_shift",
        "policy_shift",
        "accepted",
    )
    before, after = (
        oracle.set_shifts(
            [[row["token"] for row in s if row["accepted"] or everything] for s in seen],
            learning_rate,
        )
        for everything in (True, False)
    )
    arrays = {name: np.array([row[name] for row in rows]) for name in columns}
    return RecordedStep(
        **arrays, batch_shifts=(before, after), loss=loss, grad_norm=grad_norm, gradients=gradients
    )
