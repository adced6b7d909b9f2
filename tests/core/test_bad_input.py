# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear ValueError, and nothing updated."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from tests.helpers.batches import Batch

SOFT = {"weighting": "soft", "objective_shift_max": None}
NAMES = ("hidden_states", "logits", "actions", "advantages", "response_mask", "learning_rate")


def arguments() -> dict:
    batch = Batch.random(np.random.default_rng(0), 2, 3, 4, 10)
    batch.mask[:] = True
    return dict(zip(NAMES, batch.arguments(0.1, torch.float32), strict=True))


def poisoned(name: str, at: tuple[int, ...], value: float):
    def change(kw):
        kw[name][at] = value

    return change


def replaced(name: str, value):
    return lambda kw: kw.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poisoned("logits", (1, 2, 7), float("nan")),
            r"logits are not finite at 1 of 6 response tokens: position \(1, 2\)"),
        (poisoned("logits", (0, 1, 0), float("inf")),
            r"logits are not finite at 1 of 6 response tokens: position \(0, 1\)"),
        (poisoned("logits", (0, 1, 9), -float("inf")), r"logits are not finite at 1 of 6"),
        (poisoned("hidden_states", (1, 0, 3), float("nan")),
            r"hidden_states are not finite at 1 of 6 .*position \(1, 0\)"),
        (poisoned("hidden_states", (slice(None), slice(None), 0), float("inf")),
            r"hidden_states are not finite at 6 of 6 .*…"),
        (poisoned("advantages", (0, 2), float("nan")),
            r"advantages are not finite at 1 of 6 .*position \(0, 2\)"),
        (poisoned("actions", (0, 0), 10),
            r"actions are not token ids \(0..9\) at 1 of 6 .*position \(0, 0\)"),
        (poisoned("actions", (1, 1), -1),
            r"actions are not token ids \(0..9\) at 1 of 6 .*position \(1, 1\)"),
        (replaced("advantages", torch.zeros(2)),
            r"advantages: expected shape \[2, 3\] .*\[2, 1\].*got float32 \[2\]"),
        (replaced("advantages", torch.zeros(2, 4)),
            r"advantages: expected shape \[2, 3\] .*got float32 \[2, 4\]"),
        (replaced("advantages", torch.zeros(1, 2, 3)), r"advantages: expected shape"),
        (replaced("logits", torch.zeros(2, 3, 9)),
            r"logits: expected a float tensor \[2, 3, 10\] .*got float32 \[2, 3, 9\]"),
        (replaced("logits", torch.zeros(2, 3, 10, dtype=torch.int64)),
            r"logits: expected a float tensor"),
        (replaced("hidden_states", torch.zeros(2, 3, 5)),
            r"hidden_states: expected a float tensor \[2, 3, 4\]"),
        (replaced("hidden_states", torch.zeros(3, 3, 4)),
            r"hidden_states: expected a float tensor \[2, 3, 4\]"),
        (replaced("response_mask", torch.ones(2, 4)), r"response_mask: expected shape \[2, 3\]"),
        (replaced("actions", torch.zeros(2, 3)),
            r"actions: expected integer token ids .*got float32 \[2, 3\]"),
        (replaced("learning_rate", -1.0), r"learning_rate: expected a finite float >= 0, got -1.0"),
        (replaced("learning_rate", float("nan")), r"learning_rate: expected a finite float >= 0"),
        (replaced("sequence_ids", torch.zeros(2, 3, dtype=torch.int64)),
            r"sequence_ids and num_sequences must be given together"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("top_k", [4, None])
def test_one_clear_error_and_nothing_updated(change, message, top_k):
    capo = CapoFilter(
        CapoConfig(top_k=top_k, policy_shift_max=None, objective_shift_max=None), 10, 4
    )
    good = arguments()
    capo.evaluate(**good)
    capo.step()
    before = {k: v.clone() for k, v in capo.state_dict().items() if k != "step"}
    bad = arguments()
    change(bad)
    with pytest.raises(ValueError, match=message):
        capo.evaluate(**bad)
    capo.step()  # nothing was accumulated either
    after = capo.state_dict()
    assert after["step"] == 1 and all(torch.equal(before[k], after[k]) for k in before)


def test_values_outside_the_mask_may_be_anything():
    capo, reference = (
        CapoFilter(CapoConfig(top_k=4, granularity=("token", "sequence")), 10, 4) for _ in range(2)
    )
    kw, clean = arguments(), arguments()
    for x in (kw, clean):
        x["response_mask"][1, 2] = False
    for name, value in (
        ("logits", float("nan")),
        ("hidden_states", float("inf")),
        ("advantages", float("nan")),
        ("actions", -5),
    ):
        kw[name][1, 2] = value
    for _ in range(2):
        a, b = capo.evaluate(**kw), reference.evaluate(**clean)
        mask = kw["response_mask"]
        assert torch.equal(a.policy_shift[mask], b.policy_shift[mask]) and torch.equal(
            a.accepted, b.accepted
        )
        assert [float(x) for x in capo.batch_shifts().before] == [
            float(x) for x in reference.batch_shifts().before
        ]
        capo.step(), reference.step()
        assert torch.equal(capo.state_dict()["exp_avg"], reference.state_dict()["exp_avg"])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"policy_shift_max": -1e-4}, "capo.policy_shift_max=-0.0001: a threshold must be >= 0"),
        ({"objective_shift_max": -1}, "capo.objective_shift_max=-1: a threshold must be >= 0"),
        ({"objective_shift_max": float("nan")}, "capo.objective_shift_max=nan: expected a finite "
        "number"),
        ({"policy_shift_max": "small"}, "capo.policy_shift_max='small': expected a finite number"),
        ({"objective_shift_min": "low"}, "capo.objective_shift_min='low': expected 'symmetric', a "
        "number or null"),
        ({"top_k": 0}, "capo.top_k=0: expected an integer >= 1, or null"),
        ({"top_k": 2.5}, "capo.top_k=2.5: expected an integer"),
        ({"optimizer_model": "muon"}, "capo.optimizer_model='muon': expected one of adam, sgd"),
        ({"mode": "on"}, "capo.mode='on': expected one of filter, track, off"),
        ({"weighting": "hardly"}, "capo.weighting='hardly': expected one of hard, soft$"),
        ({"weighting": "soft"}, "capo.weighting=soft has no m_H test, but "
        "capo.objective_shift_max=0.01 .*_max=null"),
        ({**SOFT, "objective_shift_min": 0.0}, "capo.weighting=soft has no m_H test, but .* "
        "objective_shift_min=0.0"),
        ({**SOFT, "policy_shift_max": None}, "capo.weighting=soft needs capo.policy_shift_max > 0 "
        ".*, got None"),
        ({**SOFT, "policy_shift_max": 0}, "capo.weighting=soft needs capo.policy_shift_max > 0 .*, "
        "got 0"),
        ({**SOFT, "granularity": "sequence"}, "capo.weighting=soft weighs single tokens: .*=token, "
        "not 'sequence'"),
        ({"policy_shift": "true"}, "capo.policy_shift='true': expected one of sampled, exact"),
        ({"policy_shift_max": {"target": 0.1}}, "capo.policy_shift_max.target is not a knob .*: "
        "target_rejection, memory"),
        ({"policy_shift_max": {"memory": 0.5}}, "capo.policy_shift_max.target_rejection is "
        "missing: it has no default"),
        ({"policy_shift_max": {"target_rejection": 0}},
            r"target_rejection=0: expected a number in \(0, 0.999\]"),
        ({"policy_shift_max": {"target_rejection": 0.1, "memory": 1}},
            "capo.policy_shift_max.memory=1: expected a number in"),
        ({"policy_shift_max": {"target_rejection": 0.1}, "granularity": ["token", "batch"]},
            "follows one granularity"),
        ({"policy_shift_max": {"target_rejection": 0.1}, "granularity": "batch"}, "=batch all of "
        "them have one m_F; set"),
        ({"reference_lr": 0}, r"capo.reference_lr=0: expected a number in \(0, "),
        ({"reference_lr": 1e-5, "policy_shift_max": {"target_rejection": 0.1},
          "objective_shift_max": None}, "capo.reference_lr=1e-05 has no effect: there is no fixed"),
        ({"mode": "off", "reference_lr": 1e-5}, "capo.reference_lr=1e-05 has no effect with"),
        ({"mode": "off", "policy_penalty": 1.0}, "capo.policy_penalty=1.0 has no effect with "
        "capo.mode=off; set"),
        ({"mode": "off", **SOFT}, "capo.weighting='soft' has no effect with capo.mode=off"),
        ({"mode": "off", "on_nonfinite": "skip_batch"}, "capo.on_nonfinite='skip_batch' has no "
        "effect with capo.mode=off"),
        ({"max_rejection": 0}, r"capo.max_rejection=0: expected a number in \(0, 1\]"),
        ({"max_rejection_steps": 0}, "capo.max_rejection_steps=0: expected an integer >= 1"),
        ({"policy_penalty": None}, "capo.policy_penalty=None: expected a finite number"),
        ({"policy_penalty": -1}, "capo.policy_penalty=-1: a threshold must be >= 0"),
        ({"objective_penalty": 1.0, "granularity": "batch"}, "objective_penalty=1.0 is of single "
        "tokens: set capo.granu"),
        ({"granularity": "word"},
            "capo.granularity='word': expected one of token, sequence, batch"),
        ({"granularity": ["token", "token"]}, "name each granularity once"),
        ({"granularity": []}, "expected one or several"),
        ({"betas": (0.9, 1.0)}, "capo.betas=.*each must be in"),
        ({"betas": 0.9}, "capo.betas=0.9: expected two numbers"),
        ({"eps": -1e-8}, "capo.eps=-1e-08: must be >= 0"),
        ({"batch_shift_tokens": -1}, "capo.batch_shift_tokens=-1: expected an integer >= 0"),
        ({"batch_shift_every": 0}, "capo.batch_shift_every=0: expected an integer >= 1$"),
        ({"batch_shift_every": None}, "capo.batch_shift_every=None: expected an integer >= 1$"),
        ({"mode": "track", "track_every": 2.0}, "capo.track_every=2.0: expected an integer >= 1$"),
        ({"mode": "track", "track_every": True},
            "capo.track_every=True: expected an integer >= 1$"),
        ({"track_every": 4}, "capo.track_every=4 needs capo.mode=track: capo.mode=filter decides "
        "in every step"),
        ({"policy_shift_mx": 1e-4}, "capo.policy_shift_mx is not a knob of CAPO. Did you mean "
        "'policy_shift_max'\\? Valid keys: "),
    ],
)  # fmt: skip
def test_knobs_are_checked(knobs, message):
    with pytest.raises(ValueError, match=message):
        CapoConfig.from_mapping(knobs)


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="capo.mode=off measures nothing: make no filter"):
        CapoFilter(CapoConfig(mode="off"), 60, 4)
    with pytest.raises(ValueError, match="capo.top_k=50 exceeds the vocabulary of 49 tokens"):
        CapoFilter(CapoConfig(), 49, 4)
    with pytest.raises(ValueError, match="padded_vocab_size=40 must be >= vocab_size=50"):
        CapoFilter(CapoConfig(), 50, 4, padded_vocab_size=40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("step"), "CAPO state holds .* expected"),
        (
            lambda s: s.update(exp_avg=torch.zeros(9, 4)),
            r"exp_avg has shape \(9, 4\), this rank needs \(10, 4\)",
        ),
        (lambda s: s["exp_avg"].fill_(float("nan")), "exp_avg holds non-finite values"),
        (lambda s: s["exp_avg_sq"].fill_(-1.0), "exp_avg_sq holds negative values"),
        (lambda s: s.update(step=-1), "step=-1 is negative"),
    ],
)
def test_corrupt_state_is_refused_and_changes_nothing(change, message):
    capo, other = (CapoFilter(CapoConfig(top_k=4), 10, 4) for _ in range(2))
    other.evaluate(**arguments())
    other.step()
    state = dict(other.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        capo.load_state_dict(state)
    assert not capo.state_dict()["exp_avg"].any() and capo.state_dict()["step"] == 0
    with pytest.raises(ValueError, match="optimizer_model='sgd' has no state"):
        CapoFilter(CapoConfig(optimizer_model="sgd", top_k=4), 10, 4).load_state_dict(state)


def test_batch_shifts_errors_say_what_to_do():
    off = CapoFilter(CapoConfig(top_k=4, batch_shift_tokens=0), 10, 4)
    off.evaluate(**arguments())
    with pytest.raises(RuntimeError, match="batch_shift_tokens > 0"):
        off.batch_shifts()
    with pytest.raises(RuntimeError, match="call evaluate\\(\\) before it"):
        CapoFilter(CapoConfig(top_k=4), 10, 4).batch_shifts()
