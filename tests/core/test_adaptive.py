# SPDX-License-Identifier: Apache-2.0
"""What adapts from step to step (threshold, soft weights and their balance, guard), against the
formulas, in every layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core.metrics import StepMetrics
from tests.helpers.batches import Batch
from tests.helpers.layouts import make_groups
from tests.helpers.oracle import Oracle
from tests.helpers.spawn import run_on_ranks
from tests.helpers.syncs import recorded_syncs

V, H, K, LR, STEPS = 21, 6, 7, 0.02, 6
THRESHOLD = {"threshold_quantile": 1e3, "threshold_correction": 0.7, "threshold_steps": 4}
SOFT = {"top_k": K, "objective_shift_max": None, "policy_shift_max": 2e-4}
CASES: dict[str, dict[str, Any]] = {
    "soft": {**SOFT, "weighting": "soft"},
    "soft_exact": {**SOFT, "weighting": "soft", "policy_shift": "exact"},
    "adaptive": {"top_k": K, "objective_shift_max": None,
        "policy_shift_max": {"target_rejection": 0.2, "memory": 0.6}},
    "adaptive_soft": {**SOFT, "weighting": "soft",
        "policy_shift_max": {"target_rejection": 0.3, "memory": 0.0}},
    "adaptive_track": {**SOFT, "mode": "track", "policy_shift_max": {"target_rejection": 0.2}},
    "adaptive_sgd": {**SOFT, "optimizer_model": "sgd",
        "policy_shift_max": {"target_rejection": 0.1, "memory": 0.5}},
    "guard": {**SOFT, "policy_shift_max": 1e-4, "max_rejection": 0.15, "max_rejection_steps": 2},
    "guard_soft": {**SOFT, "weighting": "soft", "policy_shift_max": 1e-5, "max_rejection": 0.3,
        "max_rejection_steps": 3},
}  # fmt: skip


def batches() -> list[Batch]:
    """Of lopsided advantages: the signs lose different shares."""
    rng = np.random.default_rng(0)
    made = [Batch.random(rng, 4, 8, H, V) for _ in range(STEPS)]
    for batch in made:
        batch.advantages *= np.where(batch.advantages > 0, 1.0, 0.2)
    return made


def run(
    config: CapoConfig, tp: int = 1, dp: int = 1, cp: int = 1, parts: int = 1
) -> dict[str, Any]:
    """This rank's share of the batches, in ``parts`` micro-batches."""
    at, groups = make_groups(tp, dp, cp)
    capo = CapoFilter(config, V, H, **groups)
    rows, start = capo.shard.rows, capo.shard.start
    seen = []
    for batch in batches():
        hidden, logits, *rest = batch.arguments(LR)
        logits = torch.nn.functional.pad(logits, (0, rows * tp - V), value=99.0)[
            ..., start : start + rows
        ]
        mine = (
            slice(at.dp * 4 // dp, (at.dp + 1) * 4 // dp),
            slice(at.cp * 8 // cp, (at.cp + 1) * 8 // cp),
        )
        tensors = [x[mine] for x in (hidden, logits, *rest[:-1])]
        tau = capo._weighting.policy_shift_max(LR)
        outs = [
            capo.evaluate(*(x[i] for x in tensors),
                LR) for i in torch.arange(len(tensors[0])).tensor_split(parts)
        ]  # fmt: skip
        after = capo.batch_shifts().after
        with recorded_syncs() as syncs:
            capo._weighting.step(capo.model.is_settled, capo.model.dtype)
        assert syncs == []
        capo.model.update((capo.dp_group, capo.cp_group))
        capo._retained.clear()
        seen.append(
            {
                name: torch.cat([getattr(o, name) for o in outs])
                for name in ("weights", "trust_weights", "accepted")
            }
            | {"tau": float(tau), "after": [float(x) for x in after]}
        )
    return {"at": at, "steps": seen, "state": capo.adaptive_state(), "moments": capo.state_dict()}


class Naive:
    """The rules written down a second time, one token after the other."""

    def __init__(self, config: CapoConfig):
        self.config = config
        self.oracle = Oracle(
            V, H, config.optimizer_model, K, config.betas, config.eps, config.policy_shift
        )
        target = config.policy_shift_max
        self.adaptive = target if not isinstance(target, float) else None
        self.tau = np.inf if self.adaptive else target
        self.quantile = self.correction = 1.0
        self.measured = 0
        self.streak, self.stopped = 0, False

    def step(self, batch: Batch) -> dict[str, Any]:
        config, shape = self.config, batch.mask.shape
        tokens = batch.tokens(K)
        trusted, applied, m_f = np.zeros(shape), np.zeros(shape), []
        for at in zip(*np.nonzero(batch.mask), strict=True):
            token = tokens[at[0]][at[1]]
            _, shift = self.oracle.token_shifts(token, LR)
            m_f.append(shift)
            if config.weighting == "hard":
                w = float(shift < self.tau)
            else:
                w = 1.0 if shift <= self.tau else np.sqrt(self.tau / shift)
            trusted[at] = w
            applied[at] = 1.0 if self.stopped or config.mode == "track" else w
        soft = config.weighting != "hard"
        accepted = batch.mask if soft else applied > 0
        used = tau = self.tau
        learned = []
        for at in zip(*np.nonzero(accepted), strict=True):
            token = tokens[at[0]][at[1]]
            token.advantage *= applied[at] if soft else 1.0
            learned.append(token)
        comparable = config.optimizer_model == "sgd" or self.oracle.step_count > 0
        found = (
            np.sort(m_f)[round((1 - self.adaptive.target_rejection) * (len(m_f) - 1))]
            if self.adaptive
            else 0.0
        )
        if self.adaptive and comparable and found > 0:
            self.measured += 1
            keep = min(self.adaptive.memory, 1 - 1 / self.measured)
            self.quantile = self.quantile**keep * (found / LR**2) ** (1 - keep)
            if self.measured > 1:
                above = np.mean(np.array(m_f) >= tau) / self.adaptive.target_rejection
                self.correction *= np.exp(0.2 * (min(above, 10) - 1))
            tau = self.quantile * self.correction * LR**2
        if config.max_rejection is not None:
            self.streak = (
                self.streak + 1
                if 1 - trusted.sum() / batch.mask.sum() > config.max_rejection
                else 0
            )
            self.stopped |= self.streak >= config.max_rejection_steps
        after = [
            [t for t, k in zip(row, keep, strict=True) if k]
            for row, keep in zip(tokens, accepted, strict=True)
        ]
        shifts = self.oracle.set_shifts(after, LR)
        self.oracle.update(learned)
        self.tau = tau
        return {
            "weights": applied,
            "trust_weights": trusted,
            "accepted": accepted,
            "tau": used,
            "after": shifts,
        }


@pytest.mark.parametrize("name", CASES)
def test_equals_the_rules_written_down_naively(name):
    config = CapoConfig(**CASES[name])
    found, naive = run(config), Naive(config)
    for batch, step in zip(batches(), found["steps"], strict=True):
        expected = naive.step(batch)
        assert step["tau"] == pytest.approx(expected["tau"], rel=1e-9)
        for key in ("weights", "trust_weights", "accepted"):
            np.testing.assert_allclose(
                step[key].double().numpy(), expected[key], rtol=1e-9, err_msg=key
            )
        # A filter that only tracks, or has stopped, still reports what the trust region would have
        # left.
        if np.array_equal(expected["weights"], expected["trust_weights"]):
            assert step["after"] == pytest.approx(expected["after"], rel=1e-9)
    weights = torch.stack([step["trust_weights"] for step in found["steps"]])[
        torch.from_numpy(np.stack([b.mask for b in batches()]))
    ]
    assert float(weights.min()) < 1
    if config.weighting != "hard":
        assert ((weights > 0) & (weights < 1)).any() and float(weights.max()) == 1
    if config.max_rejection is not None:
        assert naive.stopped and found["state"]["filter_stopped"] == 1.0
    if config.optimizer_model == "adam":
        np.testing.assert_allclose(
            found["moments"]["exp_avg_sq"], naive.oracle.exp_avg_sq, rtol=1e-9, atol=1e-18
        )


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(name):
    config = CapoConfig(**CASES[name])
    check_same(run(config), [run(config, parts=3)])


@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)], ids=str)
def test_every_layout_adapts_alike(layout):
    for name, results in zip(CASES, run_on_ranks_all(layout), strict=True):
        check_same(run(CapoConfig(**CASES[name])), results)


def run_on_ranks_all(layout: tuple[int, int, int]) -> list[list[dict[str, Any]]]:
    """Per case, what every rank found."""
    ranks = run_on_ranks(run_all, int(np.prod(layout)), layout)
    return [list(results) for results in zip(*ranks, strict=True)]


def run_all(layout: tuple[int, int, int]) -> list[dict[str, Any]]:
    return [run(CapoConfig(**knobs), *layout) for knobs in CASES.values()]


def check_same(whole: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Every rank saw its share of what one process saw, and ended in the same state."""
    dp, cp = (max(getattr(r["at"], name) for r in ranks) + 1 for name in ("dp", "cp"))
    for rank in ranks:
        assert rank["state"] == pytest.approx(whole["state"], rel=1e-9)
        for mine, all_of_it in zip(rank["steps"], whole["steps"], strict=True):
            assert mine["tau"] == pytest.approx(all_of_it["tau"], rel=1e-9)
            assert mine["after"] == pytest.approx(all_of_it["after"], rel=1e-9)
            for key in ("weights", "trust_weights", "accepted"):
                share = all_of_it[key].chunk(dp, 0)[rank["at"].dp].chunk(cp, 1)[rank["at"].cp]
                torch.testing.assert_close(mine[key], share, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_state_round_trip_goes_on_alike(name):
    config = CapoConfig(**CASES[name])
    made = batches()
    first, second = (CapoFilter(config, V, H) for _ in range(2))
    for batch in made[:3]:
        first.evaluate(*batch.arguments(LR))
        first.step()
    second.load_state_dict(
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.state_dict().items()}
    )
    second.load_adaptive_state(first.adaptive_state())
    for batch in made[3:]:
        a, b = first.evaluate(*batch.arguments(LR)), second.evaluate(*batch.arguments(LR))
        torch.testing.assert_close(a.weights, b.weights, rtol=1e-12, atol=0)
        first.step(), second.step()
    assert first.adaptive_state() == pytest.approx(second.adaptive_state(), rel=1e-12)


def test_what_cannot_be_a_state_is_refused_and_changes_nothing():
    capo = CapoFilter(CapoConfig(**CASES["adaptive_soft"], max_rejection=0.5), V, H)
    before = capo.adaptive_state()
    assert before == {"filter_stopped": 0, "rejection_streak": 0}
    for state, message in (
        (
            {"threshold": 1.0},
            "threshold is unknown; expected some of threshold_quantile, threshold_correction",
        ),
        (
            {"rejection_streak": 2, "threshold_steps": float("nan")},
            "threshold_steps=nan is not a finite number >= 0",
        ),
        ({"rejection_streak": -1.0}, "rejection_streak=-1.0 is not a finite number"),
        (
            {**THRESHOLD, "threshold_quantile": 0.0},
            "threshold_quantile=0 and .* would reject",
        ),
        ({**THRESHOLD, "threshold_steps": 0.5}, r"threshold_steps=0.5 is not an integer in 1\.\."),
        ({"threshold_steps": 3}, "threshold_steps without threshold_quantile"),
    ):
        with pytest.raises(ValueError, match=message):
            capo.load_adaptive_state(state)
        assert capo.adaptive_state() == before
    # Of a run that adapted.
    CapoFilter(CapoConfig(top_k=K), V, H).load_adaptive_state(THRESHOLD)


def test_a_threshold_without_its_rate_starts_anew():
    """Of a release before 0.2, which had balanced weights too."""
    capo = CapoFilter(CapoConfig(**CASES["adaptive"]), V, H)
    capo.load_adaptive_state(
        {"policy_threshold": 1e-4, "balance_positive": 0.5, "balance_negative": 1.0}
    )
    assert capo.adaptive_state() == {} and float(capo.policy_shift_max) == float("inf")


def test_discarded_mini_batches_leave_no_trace():
    config = CapoConfig(**CASES["adaptive_soft"], max_rejection=0.01, max_rejection_steps=1)
    a, b = (CapoFilter(config, V, H) for _ in range(2))
    made = batches()
    for i, batch in enumerate(made[:3]):
        if i == 1:
            b.evaluate(*made[5].arguments(LR))
            b.discard()
        a.evaluate(*batch.arguments(LR)), b.evaluate(*batch.arguments(LR))
        a.step(), b.step()
    assert a.adaptive_state() == b.adaptive_state()


def test_a_step_without_information_moves_nothing():
    """No token, or m_F = 0 at the quantile: the threshold stays, instead of becoming 0 and
    rejecting everything ever after.
    """
    capo = CapoFilter(CapoConfig(**CASES["adaptive_sgd"], max_rejection=0.05), V, H)
    first = batches()[0]
    capo.evaluate(*first.arguments(LR))
    capo.step()
    before = capo.adaptive_state()
    assert before["threshold_quantile"] > 0
    for field in ("mask", "advantages"):
        empty = batches()[1]
        getattr(empty, field)[:] = 0
        capo.evaluate(*empty.arguments(LR))
        capo.step()
        assert capo.adaptive_state() == before
    capo.step()  # a rank without micro-batches
    assert capo.adaptive_state() == before


def test_soft_weights_bound_the_shift_of_the_weighted_gradient():
    """sgd: m_F is quadratic in the advantage, so the weighted token's m_F is at most tau."""
    config = CapoConfig(**{**CASES["soft"], "policy_shift_max": 3e-5}, optimizer_model="sgd")
    hidden, logits, actions, advantages, mask, lr = batches()[0].arguments(LR)
    out = CapoFilter(config, V, H).evaluate(hidden, logits, actions, advantages, mask, lr)
    weighted = CapoFilter(config, V, H).evaluate(
        hidden, logits, actions, advantages * out.weights, mask, lr
    )
    assert float(out.policy_shift[mask].max()) > 3e-5
    assert float(weighted.policy_shift[mask].max()) == pytest.approx(3e-5, rel=1e-9)


def test_nan_shifts_get_no_weight():
    *tensors, lr = batches()[0].arguments(LR)
    tensors[0][0, 0] = float("nan")
    tensors[4][:] = True
    for name in ("soft", "adaptive"):
        out = CapoFilter(CapoConfig(**CASES[name]), V, H).evaluate(*tensors, lr, check_values=False)
        assert float(out.weights[0, 0]) == 0.0 and bool((out.weights[0, 1:] > 0).all())


def test_metrics_of_weights_against_counting():
    for name in ("soft", "adaptive", "guard"):
        capo, metrics, batch = (
            CapoFilter(CapoConfig(**CASES[name]), V, H),
            StepMetrics(),
            batches()[0],
        )
        for _ in range(3):
            out = capo.evaluate(*batch.arguments(LR))
            metrics = StepMetrics()
            ids = torch.arange(4).repeat_interleave(8)
            metrics.add(
                out, torch.from_numpy(batch.advantages), torch.from_numpy(batch.mask), ids, 4
            )
            found = metrics.compute(capo.adaptive_metrics())
            capo.step()
        w, a = out.trust_weights.numpy()[batch.mask], batch.advantages[batch.mask]
        assert found["capo/weight_mean"] == pytest.approx(w.mean()) and 0 < w.mean() < 1
        for sign, of in (("positive", a > 0), ("negative", a < 0)):
            kept = (w * abs(a))[of].sum() / abs(a)[of].sum()
            assert found[f"capo/advantage_kept_{sign}"] == pytest.approx(kept)
        assert found.get("capo/filter_stopped") == (1.0 if name == "guard" else None)
        assert ("capo/policy_threshold" in found) == (
            name == "adaptive"
        ) and "capo/penalty_mean" not in found
        assert found["capo/nothing_accepted"] == 0.0
