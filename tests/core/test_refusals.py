# SPDX-License-Identifier: Apache-2.0
"""A call that raises says in one sentence what to change, and has changed nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from capo_verl.config import KLBudgetConfig
from capo_verl.core.kl_budget import KLBudget
from capo_verl.core.logits import ProjectedLogits
from capo_verl.core.metrics import StepMetrics
from tests.helpers.batches import Batch
from tests.helpers.unchanged import contents

V, H = 10, 4
NAN, INF = math.nan, math.inf
SHAPE = (2, 3)
KNOBS: dict[str, dict[str, Any]] = {
    "hard": {"policy_shift_max": 1e-4},
    "adaptive": {"policy_shift_max": {"target_rejection": 0.2}, "max_rejection": 0.5},
    "sequence": {"granularity": ("token", "sequence"), "policy_shift_max": 1e-4},
    "whole vocabulary": {"top_k": None, "policy_shift_max": None},
    "sgd": {"optimizer_model": "sgd", "policy_shift_max": 1e-4},
}


def arguments(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    batch = Batch.random(np.random.default_rng(seed), *SHAPE, H, V)
    batch.mask[:] = True
    names = (
        "hidden_states", "logits", "actions", "advantages", "response_mask", "learning_rate",
    )  # fmt: skip
    return dict(zip(names, batch.arguments(0.1, dtype), strict=True))


def make(name: str = "hard", **knobs: Any) -> CapoFilter:
    return CapoFilter(
        CapoConfig(**{"top_k": 4, "objective_shift_max": None, **KNOBS[name], **knobs}), V, H
    )


def trained(name: str = "hard", **knobs: Any) -> CapoFilter:
    """A filter after a step, in the middle of the next."""
    capo = make(name, **knobs)
    capo.evaluate(**arguments())
    capo.step()
    capo.evaluate(**arguments(seed=1))
    return capo


def refused(subject: Any, call: Callable[[], object], message: str, error: type[Exception]) -> None:
    before = contents(subject)
    with pytest.raises(error, match=message) as raised:
        call()
    assert contents(subject) == before
    assert "\n" not in str(raised.value)


def at(name: str, value: float, where: tuple[int, ...] = (0, 1)) -> Callable[[dict], object]:
    def change(kw: dict[str, Any]) -> None:
        kw.setdefault(name, torch.ones(SHAPE))[where] = value

    return change


def given(**changes: Any) -> Callable[[dict], object]:
    return lambda kw: kw.update(changes)


def cast(name: str, dtype: torch.dtype) -> Callable[[dict], object]:
    return lambda kw: kw.update({name: kw.setdefault(name, torch.ones(SHAPE)).to(dtype)})


HUGE = 10**400
DOTS = r"response tokens: position \(0, 1\)"
FP8 = torch.float8_e4m3fn
TOO_LARGE = f"advantages, hidden_states or learning_rate are too large: .* at 1 of 6 {DOTS}"
COLD = f"temperature is not a finite number > 0 at 1 of 6 {DOTS}$"
LR = "learning_rate: expected a finite float "
EVALUATE: list[tuple[str, Callable[[dict], object], str]] = [
    ("advantage 1e20", at("advantages", 1e20), TOO_LARGE),
    ("advantage -3e38", at("advantages", -3e38), TOO_LARGE),
    ("hidden 1e20", at("hidden_states", 1e20, (0, 1, 2)), TOO_LARGE),
    ("hidden -1e20", at("hidden_states", -1e20, (0, 1, 2)), TOO_LARGE),
    ("both 1e12",
        lambda kw: (at("advantages", 1e12)(kw), at("hidden_states", 1e12, (0, 1, 2))(kw)),
        TOO_LARGE),
    ("float64 advantage 1e300",
        lambda kw: (cast("advantages", torch.float64)(kw), at("advantages", 1e300)(kw)),
        f"advantages are not finite at 1 of 6 {DOTS}"),
    ("temperature 0", at("temperature", 0.0), COLD),
    ("temperature -1", at("temperature", -1.0), COLD),
    ("temperature inf", at("temperature", INF), COLD),
    ("temperature nan", at("temperature", NAN), COLD),
    ("temperature that is 0 in float32",
        lambda kw: (cast("temperature", torch.float64)(kw), at("temperature", 1e-60)(kw)), COLD),
    ("temperature of Python", given(temperature=0.7),
        r"temperature: expected a dense tensor, got 0\.7"),
    ("complex temperature", cast("temperature", torch.complex64),
        r"temperature: expected float16 to float64 or integers, got complex64 \[2, 3\]"),
    ("a masked vocabulary", at("logits", -INF, (0, 1, 5)),
        f"logits are not finite at 1 of 6 {DOTS} .mask tokens by a finite floor such as -1e4"),
    ("learning rate None", given(learning_rate=None), f"{LR}>= 0, got None"),
    ("learning rate text", given(learning_rate="0.1"), f"{LR}>= 0, got '0.1'"),
    ("learning rate 1e300", given(learning_rate=1e300), rf"{LR}<= 1e\+18, got 1e\+300"),
    ("learning rate 10^400", given(learning_rate=HUGE), f"{LR}>= 0, got 1000"),
    ("learning rate 10^5000", given(learning_rate=10**5000), f"{LR}>= 0, got a huge int"),
    ("learning rate True", given(learning_rate=True), f"{LR}>= 0, got True"),
    ("learning rate 1j", given(learning_rate=1j), f"{LR}>= 0, got 1j"),
    ("learning rate tensor", given(learning_rate=torch.tensor(0.1)), LR),
    ("learning rate 1e18",
        lambda kw: (at("advantages", 1e6)(kw), at("hidden_states", 1e3)(kw),
            kw.update(learning_rate=1e18)),
        TOO_LARGE.replace("1 of 6 .*", "")),
    ("max_tokens 0", given(skip_masked=True, max_tokens=0), "there are more response tokens than "
        r"max_tokens at 1 of 1 response tokens: position \(0, 0\)"),
    ("max_tokens 5", given(skip_masked=True, max_tokens=5), "more response tokens than max_tokens"),
    ("max_tokens -1", given(skip_masked=True, max_tokens=-1),
        "max_tokens: expected an integer >= 0, or None, got -1"),
    ("max_tokens 2.5", given(max_tokens=2.5), r"max_tokens: .*, got 2\.5"),
    ("max_tokens True", given(max_tokens=True), "max_tokens: .*, got True"),
    ("num_sequences 0", given(sequence_ids=torch.zeros(SHAPE).long(), num_sequences=0),
        "num_sequences: expected an integer >= 1, got 0"),
    ("num_sequences text", given(sequence_ids=torch.zeros(SHAPE).long(), num_sequences="2"),
        "num_sequences: expected an integer >= 1, got '2'"),
    ("complex sequence_ids",
        given(sequence_ids=torch.zeros(SHAPE, dtype=torch.complex64), num_sequences=2),
        "sequence_ids: expected float16 to float64 or integers, got complex64"),
    ("bool sequence_ids", given(sequence_ids=torch.zeros(SHAPE).bool(), num_sequences=2),
        r"sequence_ids: expected integers of shape \[2, 3\], got bool"),
    ("sequence_ids out of range",
        given(sequence_ids=torch.full(SHAPE, 2), num_sequences=2), r"are out of range \(0..1\)"),
    ("float8 hidden", cast("hidden_states", FP8),
        r"hidden_states: expected a float tensor .*, got float8_e4m3fn \[2, 3, 4\]"),
    ("float8 logits", cast("logits", FP8), r"logits: expected a float .*got float8_e4m3fn"),
    ("float8 advantages", cast("advantages", FP8), "advantages: expected float16 .* got float8_"),
    ("float8 mask", cast("response_mask", FP8), "response_mask: expected float16 .* got float8_"),
    ("complex hidden", cast("hidden_states", torch.complex64), "hidden_states: .* got complex64"),
    ("complex advantages", cast("advantages", torch.complex64), "advantages: .* got complex64"),
    ("complex actions", cast("actions", torch.complex64), "actions: .* got complex64"),
    ("sparse hidden", lambda kw: kw.update(hidden_states=kw["hidden_states"].to_sparse()),
        "hidden_states: expected a dense tensor"),
    ("no hidden", given(hidden_states=None), "hidden_states: expected a dense tensor, got None"),
    ("numpy advantages", given(advantages=np.zeros(SHAPE)), "advantages: expected a dense tensor"),
    ("a list of actions", given(actions=[[0] * 3] * 2), r"actions: .*, got \[\[0"),
    ("no mask", given(response_mask=None), "response_mask: expected a dense tensor, got None"),
    ("actions elsewhere", given(actions=torch.zeros(SHAPE, dtype=torch.int64, device="meta")),
        "actions: is on meta, hidden_states are on cpu: move them to the same device"),
    ("a mask of 0.5", lambda kw: (cast("response_mask", torch.float32)(kw),
        at("response_mask", 0.5)(kw)), f"response_mask is neither 0 nor 1 at 1 of 6 {DOTS}"),
    ("a mask of nan", lambda kw: (cast("response_mask", torch.float64)(kw),
        at("response_mask", NAN)(kw)), f"response_mask is neither 0 nor 1 at 1 of 6 {DOTS}"),
    ("a mask of 2, skipping", lambda kw: (cast("response_mask", torch.int64)(kw),
        at("response_mask", 2)(kw), kw.update(skip_masked=True)),
        f"response_mask is neither 0 nor 1 at 1 of 6 {DOTS}"),
    ("float8 LM head", given(logits=ProjectedLogits(torch.zeros(V, H).to(FP8))),
        r"ProjectedLogits.weight to be a float tensor \[10, 4\] .*got float8_e4m3fn"),
    ("complex LM head bias",
        given(logits=ProjectedLogits(torch.zeros(V, H), torch.zeros(V, dtype=torch.complex64))),
        "ProjectedLogits.bias to be a float tensor .*got complex64"),
]  # fmt: skip


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in EVALUATE], ids=[case[0] for case in EVALUATE]
)
def test_evaluate(change, message, knobs):
    capo, kw = trained(knobs), arguments()
    change(kw)
    refused(capo, lambda: capo.evaluate(**kw), message, ValueError)


@pytest.mark.parametrize(
    ("dtype", "moments", "size", "refuses"),
    [
        ("float32", "float32", 1e18, False),
        ("float32", "float32", 1e19, True),
        ("float64", "float32", 1e19, False),
        ("float64", "float32", 1e153, False),
        ("float64", "float32", 1e155, True),
        ("float64", "bfloat16", 1e19, True),
    ],
)
def test_the_largest_gradient_is_that_whose_square_the_moments_hold(dtype, moments, size, refuses):
    capo = make("whole vocabulary", moments_dtype=moments)
    kw = arguments(getattr(torch, dtype)) | {"learning_rate": 0.0}
    kw["advantages"][0, 1], kw["hidden_states"][0, 1, 2] = size, 1.0
    if refuses:
        refused(capo, lambda: capo.evaluate(**kw), "their products overflow", ValueError)
        return
    capo.evaluate(**kw, check_values=False)
    capo.step()
    assert all(capo.state_dict()[name].isfinite().all() for name in ("exp_avg", "exp_avg_sq"))
    make("whole vocabulary", moments_dtype=moments).load_state_dict(capo.state_dict())


def test_a_shift_that_divides_by_nothing_is_no_overflow():
    """Of a token without gradient, with eps = 0: its m_F is 0 / 0, which no test accepts."""
    capo = trained()
    capo.set_optimizer((0.9, 0.999), 0.0)
    kw = arguments()
    kw["advantages"][:] = 0.0
    capo.evaluate(**kw)


ZEROS = torch.zeros(V, H)
HOLDS = r"CAPO state holds .*, expected \['exp_avg', 'exp_avg_sq', 'step'\]"
STATES: list[tuple[str, Any, str]] = [
    ("no table", None, HOLDS.replace(".*", "None")),
    ("a list", [1], HOLDS),
    ("keys that are no text", {3: 1}, HOLDS),
    ("step text", {"step": "1"}, "step='1', expected an integer in 0..2"),
    ("step 1.0", {"step": 1.0}, "step=1.0, expected an integer"),
    ("step nan", {"step": NAN}, "step=nan, expected an integer"),
    ("step True", {"step": True}, "step=True, expected an integer"),
    ("step None", {"step": None}, "step=None, expected an integer"),
    ("step -1", {"step": -1}, "step=-1 is negative"),
    ("step 4.6e18", {"step": 1 << 62}, "step=4611686018427387904, expected an integer"),
    ("step 10^400", {"step": HUGE}, "step=1000.*, expected an integer"),
    ("step tensor", {"step": torch.tensor([1, 2])}, r"step=int64 \[2\], expected an integer"),
    ("complex", {"exp_avg": ZEROS.to(torch.complex64)},
        r"exp_avg=complex64 \[10, 4\], expected a float tensor \[10, 4\]"),
    ("integers", {"exp_avg_sq": ZEROS.long()}, r"exp_avg_sq=int64 \[10, 4\], expected a float"),
    ("float8", {"exp_avg": ZEROS.to(FP8)}, "exp_avg=float8_e4m3fn .*, expected a float tensor"),
    ("a list of moments", {"exp_avg": ZEROS.tolist()}, r"exp_avg=\[\[.*, expected a float tensor"),
    ("sparse", {"exp_avg": ZEROS.to_sparse()}, "exp_avg=float32 .*, expected a float tensor"),
    ("without data", {"exp_avg": ZEROS.to("meta")}, "exp_avg=float32 .*, expected a float tensor"),
    ("transposed", {"exp_avg": ZEROS.T}, r"exp_avg has shape \(4, 10\), this rank needs \(10, 4\)"),
    ("nan", {"exp_avg": ZEROS + NAN}, "exp_avg holds non-finite values"),
    ("inf", {"exp_avg_sq": ZEROS + INF}, "exp_avg_sq holds non-finite values"),
    ("negative", {"exp_avg_sq": ZEROS - 1}, "exp_avg_sq holds negative values"),
    ("float64 that is too large for the rest",
        {"exp_avg_sq": ZEROS.double() + 1e300}, "exp_avg_sq holds non-finite values"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in STATES], ids=[case[0] for case in STATES]
)
def test_load_state_dict(change, message):
    capo = trained("adaptive")
    state = change
    if isinstance(change, dict) and not any(isinstance(key, int) for key in change):
        state = {"exp_avg": ZEROS, "exp_avg_sq": ZEROS, "step": 3, **change}
    refused(capo, lambda: capo.load_state_dict(state), message, ValueError)
    refused(capo, lambda: capo.check_state_dict(state), message, ValueError)


def test_float64_moments_that_bfloat16_does_not_hold_are_refused():
    capo = make(moments_dtype="bfloat16")
    state = {"exp_avg": ZEROS.double(), "exp_avg_sq": ZEROS.double() + 3.4e38, "step": 1}
    refused(capo, lambda: capo.load_state_dict(state), "exp_avg_sq holds non-finite", ValueError)


CORRUPT = "CAPO adaptive state: "
THRESHOLD = {"threshold_quantile": 1e3, "threshold_correction": 0.7, "threshold_steps": 4}
ADAPTIVE: list[tuple[Any, str]] = [
    (None, f"{CORRUPT}expected a dict, got None"),
    ([("threshold_steps", 1.0)], f"{CORRUPT}expected a dict, got "),
    ({**THRESHOLD, "other": 1.0}, f"{CORRUPT}other is unknown"),
    ({1: 1.0}, f"{CORRUPT}1 is unknown"),
    ({"threshold_steps": HUGE}, f"{CORRUPT}threshold_steps=1000.* is not a finite number"),
    ({"threshold_steps": "1"}, f"{CORRUPT}threshold_steps='1' is not a finite number"),
    ({"threshold_steps": None}, f"{CORRUPT}threshold_steps=None is not a finite number"),
    ({"threshold_steps": True}, f"{CORRUPT}threshold_steps=True is not a finite number"),
    ({**THRESHOLD, "threshold_quantile": 1e-60}, f"{CORRUPT}threshold_quantile=1e-60 and .* would"),
    (
        {**THRESHOLD, "threshold_quantile": 1e60},
        rf"{CORRUPT}threshold_quantile=1e\+60 and ",
    ),
    ({**THRESHOLD, "threshold_correction": 1e-60}, f"{CORRUPT}.* threshold_correction=1e-60 would"),
    ({**THRESHOLD, "threshold_steps": 0}, f"{CORRUPT}threshold_steps=0 is not an integer in 1"),
    ({"threshold_correction": 1.0}, f"{CORRUPT}threshold_correction without threshold_quantile"),
    ({**THRESHOLD, "rejection_streak": 1e300}, f"{CORRUPT}rejection_streak=1e.300 is"),
    ({**THRESHOLD, "rejection_streak": 0.5}, f"{CORRUPT}rejection_streak=0.5 is not"),
    ({"rejection_streak": 3, "filter_stopped": 2}, f"{CORRUPT}filter_stopped=2 is not an integer"),
    ({"rejection_streak": 3, "filter_stopped": NAN}, f"{CORRUPT}filter_stopped=nan is not"),
    ({"rejection_streak": 3, "balance_positive": HUGE}, f"{CORRUPT}balance_positive=1000"),
]


@pytest.mark.parametrize(("state", "message"), ADAPTIVE, ids=[says for _, says in ADAPTIVE])
@pytest.mark.parametrize("knobs", ["adaptive", "hard"])
def test_load_adaptive_state(state, message, knobs):
    capo = trained(knobs)
    refused(capo, lambda: capo.load_adaptive_state(state), message, ValueError)
    refused(capo, lambda: capo.check_adaptive_state(state), message, ValueError)


FOUND = {"curvature": 1.0, "measured": 2, "floor": 1e-9, "rate": 0.5}
BUDGET: list[tuple[Any, str]] = [
    (None, "kl_budget state: expected a dict, got None"),
    ({3: 1.0}, "expected the keys curvature, measured, floor, rate, got 3"),
    ({**FOUND, "curvature": HUGE}, "curvature=1000.*, expected a positive number, or null"),
    ({**FOUND, "measured": HUGE}, "measured=1000.*, expected an integer >= 0"),
    ({**FOUND, "measured": True}, "measured=True, expected an integer >= 0"),
    ({**FOUND, "rate": [0.5]}, r"rate=\[0.5\], expected a positive number, or null"),
    ({"scale": HUGE}, "kl_budget state: scale=1000.*, expected a positive number"),
    ({"scale": 10**5000}, "kl_budget state: scale=a huge int, expected a positive number"),
    ({"scale": 0.5, "calibration": HUGE}, "calibration=1000.*, expected a positive number"),
    ({"scale": -0.5}, "scale=-0.5, expected a positive number"),
    ({"scale": True}, "scale=True, expected a positive number"),
    ({"scale": [0.5]}, r"scale=\[0.5\], expected a positive number"),
    ({"scale": 1 + 1e-9}, "scale=1.000000001, expected at most 1"),
]


@pytest.mark.parametrize(("state", "message"), BUDGET, ids=[says for _, says in BUDGET])
def test_load_state_of_a_budget(state, message):
    budget = KLBudget(KLBudgetConfig(delta=1e-4))
    budget.end_step(1.0)
    refused(budget, lambda: budget.load_state_dict(state), message, ValueError)
    refused(budget, lambda: budget.check_state_dict(state), message, ValueError)


@pytest.mark.parametrize(
    ("kl", "message"),
    [(NAN, "kl is NaN"), ("1", "kl='1': expected a number"), (HUGE, "kl=1000"), (True, "kl=True"),
        (torch.tensor(1.0), "kl=float32")],
)  # fmt: skip
def test_what_a_budget_cannot_learn_from(kl, message):
    budget = KLBudget(KLBudgetConfig(delta=1e-4))
    budget.end_step(1.0)
    refused(budget, lambda: budget.end_step(kl), message, ValueError)


@pytest.mark.parametrize(
    ("betas", "eps", "message"),
    [
        ((NAN, 0.999), 1e-8, "capo.betas=nan: expected a finite number"),
        ((0.9, INF), 1e-8, "capo.betas=inf: expected a finite number"),
        ((0.9, 1.0), 1e-8, r"capo.betas=\(0.9, 1.0\): each must be in"),
        ((0.9,), 1e-8, r"capo.betas=\(0.9,\): expected two numbers"),
        (None, 1e-8, "capo.betas=None: expected two numbers"),
        ((0.9, "0.99"), 1e-8, "capo.betas='0.99': expected a finite number"),
        ((0.8, 0.99), NAN, "capo.eps=nan: expected a finite number"),
        ((0.8, HUGE), 1e-8, "capo.betas=1000.*: expected a finite number"),
        ((0.8, 0.99), HUGE, "capo.eps=1000.*: expected a finite number"),
        ((0.8, 0.99), None, "capo.eps=None: expected a finite number"),
        ((0.8, 0.99), -1e-8, "capo.eps=-1e-08: must be >= 0"),
    ],
)
@pytest.mark.parametrize("knobs", ["hard", "sgd"])
def test_set_optimizer(betas, eps, message, knobs):
    capo = trained(knobs)
    refused(capo, lambda: capo.set_optimizer(betas, eps), message, ValueError)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0: expected an integer >= 1"),
        ({"hidden_size": -4}, "hidden_size=-4: expected an integer >= 1"),
        ({"hidden_size": 4.0}, "hidden_size=4.0: expected an integer >= 1"),
        ({"hidden_size": "4"}, "hidden_size='4': expected an integer >= 1"),
        ({"hidden_size": None}, "hidden_size=None: expected an integer >= 1"),
        ({"vocab_size": 0}, "vocab_size=0: expected an integer >= 1"),
        ({"vocab_size": True}, "vocab_size=True: expected an integer >= 1"),
        ({"vocab_size": NAN}, "vocab_size=nan: expected an integer >= 1"),
        ({"padded_vocab_size": 0}, "padded_vocab_size=0: expected an integer >= 1"),
        ({"padded_vocab_size": 10.0}, "padded_vocab_size=10.0: expected an integer >= 1"),
    ],
)
def test_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        CapoFilter(CapoConfig(top_k=4), **{"vocab_size": V, "hidden_size": H, **sizes})


@pytest.mark.parametrize("knobs", ["hard", "adaptive", "sequence"])
@pytest.mark.parametrize("call", ["step", "batch_shifts", "evaluate"])
def test_modified_hidden_states(call, knobs, monkeypatch):
    """The threshold does not move either."""
    monkeypatch.setattr("capo_verl.core.accepted.fold_limit", lambda rows, hidden_size: 1 << 20)
    capo, kw = make(knobs), arguments()
    for seed in (1, 2):
        capo.evaluate(**arguments(seed=seed))
        capo.step()
    capo.evaluate(**kw)
    kw["hidden_states"].mul_(2)
    calls = {
        "step": capo.step,
        "batch_shifts": capo.batch_shifts,
        "evaluate": lambda: capo.evaluate(**arguments(seed=3)),
    }
    refused(capo, calls[call], "hidden_states were modified in place", RuntimeError)
    capo.discard()
    capo.evaluate(**arguments())
    capo.step()


def test_batch_shifts_of_an_unknown_kind():
    capo = trained()
    message = "policy_shift='true': expected sampled or exact"
    refused(capo, lambda: capo.batch_shifts("true"), message, ValueError)


def test_modified_hidden_states_that_were_about_to_be_folded(monkeypatch):
    monkeypatch.setattr("capo_verl.core.accepted.fold_limit", lambda rows, hidden_size: 150)
    capo, kw = make("adaptive"), arguments()
    capo.evaluate(**kw)
    kw["hidden_states"].mul_(2)
    refused(
        capo, lambda: capo.evaluate(**arguments(seed=1)), "were modified in place", RuntimeError
    )


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("inference", [False, True])
def test_what_else_is_modified_does_not_count(knobs, inference):
    """All but the hidden states may be overwritten, and so may what evaluate() returned."""
    outcomes = []
    for modifies in (False, True):
        with torch.inference_mode(inference):
            capo, kw = trained(knobs), arguments()
            kw |= {"temperature": torch.ones(SHAPE), "num_sequences": 2,
                "sequence_ids": torch.arange(2).repeat_interleave(3).view(SHAPE)}  # fmt: skip
            out = capo.evaluate(**kw)
            if modifies:
                for name, x in kw.items():
                    if isinstance(x, torch.Tensor) and (name != "hidden_states" or inference):
                        x.zero_()
                for x in (out.accepted, out.weights, out.in_trust_region, out.policy_shift):
                    x.zero_()
            shifts = capo.batch_shifts()
            capo.step()
            outcomes.append((contents(shifts), contents(capo)))
    assert outcomes[0] == outcomes[1]


def test_no_response_token_needs_no_place():
    kw = arguments()
    kw["response_mask"][:] = False
    out = make().evaluate(**kw, skip_masked=True, max_tokens=0)
    assert not out.accepted.any() and out.accepted.shape == SHAPE


def test_a_masked_vocabulary_with_a_finite_floor_is_exact():
    """The weight of a token at -1e4 is 0, as it would be at -inf."""
    capo, shorter = make("whole vocabulary"), CapoFilter(make("whole vocabulary").config, V - 2, H)
    kw, short = arguments(), arguments()
    for x in (kw, short):
        x["actions"].clamp_(max=V - 3)
    kw["logits"][..., V - 2 :] = -1e4
    short["logits"] = short["logits"][..., : V - 2]
    for _ in range(2):
        a, b = capo.evaluate(**kw), shorter.evaluate(**short)
        torch.testing.assert_close(a.policy_shift, b.policy_shift, rtol=1e-5, atol=0)
        capo.step(), shorter.step()
    assert not capo.state_dict()["exp_avg"][V - 2 :].any()


def test_metrics_of_a_wrong_shape():
    capo, kw, metrics = make(), arguments(), StepMetrics()
    out = capo.evaluate(**kw)
    ids = torch.arange(2).repeat_interleave(3).view(SHAPE)
    metrics.add(out, kw["advantages"], kw["response_mask"], ids, 2)
    before = contents(metrics)
    with pytest.raises(RuntimeError, match="out of bounds"):
        metrics.add(out, kw["advantages"], kw["response_mask"], ids + 5, 2)
    assert contents(metrics) == before


def test_micro_batches_of_different_precision_have_one_threshold():
    """Their shifts are compared as numbers, not as bits."""
    thresholds = []
    for dtypes in ((torch.float64, torch.float64), (torch.float32, torch.float64)):
        capo, metrics = make("adaptive"), StepMetrics()
        for _ in range(2):
            for seed, dtype in enumerate(dtypes):
                kw = arguments(dtype, seed)
                ids = torch.arange(2).repeat_interleave(3)
                out = capo.evaluate(**kw)
                metrics.add(out, kw["advantages"], kw["response_mask"], ids, 2)
            capo.step()
        p50 = metrics.compute()["capo/policy_shift_p50"]
        thresholds.append((float(capo.policy_shift_max), p50))
    assert thresholds[1] == pytest.approx(thresholds[0], rel=1e-5)
