# SPDX-License-Identifier: Apache-2.0
"""Agreement with numbers computed by the authors' published implementation (tests/golden)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from tests.helpers.oracle import Oracle, make_token

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(GOLDEN.glob("*.npz"))
assert len(CASES) == 6


class Case:
    def __init__(self, path: Path):
        self.data = np.load(path)
        self.meta = json.loads(str(self.data["meta"]))
        self.vocab_size, self.hidden_size = (
            self.data["s0_logits"].shape[-1],
            self.data["s0_hidden"].shape[-1],
        )

    def config(self, **overrides) -> CapoConfig:
        meta = self.meta
        knobs = {
            "optimizer_model": meta["optimizer_model"],
            "top_k": meta["top_k"],
            "policy_shift_max": meta["tau_f"],
            "objective_shift_max": meta["tau_h"],
            "objective_shift_min": "symmetric" if meta["symmetric"] else 0.0,
            "betas": (meta["beta1"], meta["beta2"]),
            "eps": meta["eps"],
        }
        return CapoConfig(**{**knobs, **overrides})

    def filter(self, **overrides) -> CapoFilter:
        return CapoFilter(
            self.config(**overrides), vocab_size=self.vocab_size, hidden_size=self.hidden_size
        )

    def steps(self):
        for i in range(self.meta["steps"]):
            prefix = f"s{i}_"
            yield {k[len(prefix) :]: self.data[k] for k in self.data.files if k.startswith(prefix)}

    def arguments(self, step):
        arrays = ("hidden", "logits", "actions", "advantages", "response_mask")
        hidden, logits, actions, advantages, mask = (
            torch.from_numpy(step[name]) for name in arrays
        )
        return hidden, logits, actions, advantages[:, None], mask, self.meta["lr"]


@pytest.fixture(params=CASES, ids=lambda p: p.stem)
def case(request) -> Case:
    return Case(request.param)


def assert_close(actual, expected, rtol):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=rtol, atol=1e-300)


def test_tokens_moments_and_batch(case):
    capo = case.filter()
    for step in case.steps():
        out = capo.evaluate(*case.arguments(step))
        assert_close(out.objective_shift, step["m_h"], 1e-9)
        assert_close(out.policy_shift, step["m_f"], 1e-9)
        np.testing.assert_array_equal(out.accepted.numpy(), step["accepted"].astype(bool))
        before, _ = capo.batch_shifts()
        assert_close(before.objective, step["global_m_h"], 1e-6)
        assert_close(before.policy, step["global_m_f"], 1e-6)
        capo.step()
        if case.meta["optimizer_model"] == "adam":
            state = capo.state_dict()
            np.testing.assert_allclose(
                state["exp_avg"], step["exp_avg_after"], rtol=1e-9, atol=1e-18
            )
            np.testing.assert_allclose(
                state["exp_avg_sq"], step["exp_avg_sq_after"], rtol=1e-9, atol=1e-20
            )


def test_sequence_and_batch_granularity(case):
    """The same numbers as decisions: all tokens of a sequence (of the batch) carry the shift of the
    set.
    """
    tokens = case.filter()
    for step in case.steps():
        arguments, mask = case.arguments(step), step["response_mask"] > 0
        for granularity, rtol in (("sequence", 1e-9), ("batch", 1e-6)):
            capo = case.filter(granularity=granularity)
            capo.load_state_dict(tokens.state_dict())
            out = capo.evaluate(*arguments)
            name = {"sequence": "sequence", "batch": "global"}[granularity]
            m_h, m_f = (
                np.broadcast_to(step[f"{name}_{m}"].reshape(-1, 1), mask.shape)
                for m in ("m_h", "m_f")
            )
            assert_close(out.objective_shift.numpy()[mask], m_h[mask], rtol)
            assert_close(out.policy_shift.numpy()[mask], m_f[mask], rtol)
            low = -case.meta["tau_h"] if case.meta["symmetric"] else 0.0
            inside = (m_f < case.meta["tau_f"]) & (m_h < case.meta["tau_h"]) & (m_h >= low) & mask
            np.testing.assert_array_equal(out.accepted.numpy(), inside)
        tokens.evaluate(*arguments)
        tokens.step()


def test_oracle_agrees_too(case):
    """The oracle that the other tests trust reproduces the same numbers."""
    meta = case.meta
    oracle = Oracle(
        case.vocab_size,
        case.hidden_size,
        meta["optimizer_model"],
        meta["top_k"],
        (meta["beta1"], meta["beta2"]),
        meta["eps"],
    )
    for step in case.steps():
        tokens = [
            [make_token(h, z, a, adv, meta["top_k"]) for h, z, a in zip(hs, zs, acts, strict=True)]
            for hs, zs, acts, adv in zip(
                step["hidden"], step["logits"], step["actions"], step["advantages"], strict=True
            )
        ]
        shifts = np.array([[oracle.token_shifts(t, meta["lr"]) for t in row] for row in tokens])
        assert_close(shifts[..., 0], step["m_h"], 1e-12)
        assert_close(shifts[..., 1], step["m_f"], 1e-12)
        kept = [
            [t for t, m in zip(row, ms, strict=True) if m]
            for row, ms in zip(tokens, step["response_mask"], strict=True)
        ]
        assert_close(
            [oracle.set_shifts([s], meta["lr"])[0] for s in kept], step["sequence_m_h"], 1e-12
        )
        assert_close(oracle.set_shifts(kept, meta["lr"])[1], step["global_m_f"], 1e-6)
        oracle.update(
            [
                t
                for row, ms in zip(tokens, step["accepted"], strict=True)
                for t, m in zip(row, ms, strict=True)
                if m
            ]
        )
        if meta["optimizer_model"] == "adam":
            np.testing.assert_allclose(
                oracle.exp_avg, step["exp_avg_after"], rtol=1e-12, atol=1e-16
            )
