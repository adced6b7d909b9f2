# SPDX-License-Identifier: Apache-2.0
"""The rivals a second time: loops over tokens in Python's floats, with gradients written down by
hand.

Every function takes a ``Case`` and knobs and returns ``loss[b][t]`` and ``gradient[b][t]``, the
derivative of that loss with respect to the token's own new log-probability, for tokens of the
response mask (0 elsewhere).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass
class Case:
    """Arrays ``[B, T]``, ``group`` ``[B]``."""

    old: np.ndarray
    new: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    entropy: np.ndarray
    tokens: np.ndarray
    group: np.ndarray

    @classmethod
    def random(cls, seed: int, b: int = 6, t: int = 9) -> Case:
        """Ratios from about e^-3 to e^3, lengths from 1 to t, a hole in every second response, one
        advantage of 0.
        """
        rng = np.random.default_rng(seed)
        mask = np.arange(t) < rng.integers(1, t + 1, b)[:, None]
        mask[::2, 2] = False
        advantages = rng.choice([-1.5, -0.5, 0.7, 2.0], (b, 1)) * np.ones((b, t))
        advantages[b - 1] = 0.0
        old = -rng.exponential(1.5, (b, t))
        return cls(
            old, old + rng.standard_normal((b, t)), advantages, mask, rng.exponential(0.8, (b, t)),
            rng.integers(0, 2, (b, t)), np.arange(b) // 3,
        )  # fmt: skip

    def tokens_of_responses(self) -> list[tuple[int, int]]:
        return [(i, j) for i, j in np.ndindex(self.mask.shape) if self.mask[i, j]]


Result = tuple[np.ndarray, np.ndarray]


def _each(case: Case, token) -> Result:
    """Apply ``token(i, j, r, A) -> loss, gradient`` to every response token."""
    loss, gradient = np.zeros(case.mask.shape), np.zeros(case.mask.shape)
    for i, j in case.tokens_of_responses():
        r = math.exp(case.new[i, j] - case.old[i, j])
        loss[i, j], gradient[i, j] = token(i, j, r, case.advantages[i, j])
    return loss, gradient


def _clip(r: float, a: float, low: float, high: float, dual: float) -> tuple[float, float]:
    if a > 0:
        return (-a * r, -a * r) if r <= high else (-a * high, 0.0)
    if r < low:
        return -a * low, 0.0
    return (-a * r, -a * r) if r <= dual else (-a * dual, 0.0)


def entropy_mask(case: Case, top_share, normalise_by, clip_low, clip_high, dual_clip) -> Result:
    where = case.tokens_of_responses()
    count = math.ceil(round(top_share * len(where), 9))
    chosen = sorted(where, key=lambda ij: -case.entropy[ij])[:count]
    scale = len(where) / count if normalise_by == "selected" else 1.0

    def token(i, j, r, a):
        if (i, j) not in chosen:
            return 0.0, 0.0
        loss, gradient = _clip(r, a, 1 - clip_low, 1 + clip_high, dual_clip)
        return scale * loss, scale * gradient

    return _each(case, token)


def advantage_reweighting(case: Case, alpha, clip_low, clip_high, dual_clip) -> Result:
    def token(i, j, r, a):
        return _clip(
            r,
            (alpha * math.exp(case.old[i, j]) + 1 - alpha) * a,
            1 - clip_low,
            1 + clip_high,
            dual_clip,
        )

    return _each(case, token)


def lopti(case: Case, eta, alpha, part, clip_low, clip_high, dual_clip, epoch=0) -> Result:
    if part == "alternate":
        part = ["low", "high"][epoch % 2]

    def token(i, j, r, a):
        probability = math.exp(case.old[i, j])
        if part != "both" and (probability < eta) != (part == "low"):
            return 0.0, 0.0
        return _clip(
            r, (alpha * probability + 1 - alpha) * a, 1 - clip_low, 1 + clip_high, dual_clip
        )

    return _each(case, token)


def dcpo(case: Case, eps_low, eps_high, ratio_max) -> Result:
    def token(i, j, r, a):
        q = math.exp(case.old[i, j])
        low = 0.5 + 0.5 * math.sqrt(max(1 - 4 * eps_low / q, 0))
        high = min(0.5 + 0.5 * math.sqrt(1 + 4 * eps_high / q), ratio_max)
        return _clip(r, a, low, high, ratio_max)

    return _each(case, token)


def bapo_bounds(
    case: Case, target, low_start, low_max, low_step, high_start, high_max, high_step
) -> tuple[float, float]:
    """The authors' search: while the ratio of the masses is too small raise the lower bound, then
    the upper one.
    """

    def ratio(low, high):
        up = down = 0.0
        for i, j in case.tokens_of_responses():
            r, a = math.exp(case.new[i, j] - case.old[i, j]), case.advantages[i, j]
            up += min(r, high) * a if a >= 0 else 0.0
            down += -max(r, low) * a if a < 0 else 0.0
        return up / down if down else math.inf

    low, high = low_start, high_start
    while ratio(low, high) < target and low < low_max:
        low = min(low + low_step, low_max)
    while ratio(low, high) < target and high < high_max:
        high = min(high + high_step, high_max)
    return low, high


def bapo(case: Case, dual_clip, **search) -> Result:
    low, high = bapo_bounds(case, **search)
    return _each(case, lambda i, j, r, a: _clip(r, a, low, high, dual_clip))


def aspo(case: Case, clip_low, clip_high, dual_clip) -> Result:
    def token(i, j, r, a):
        if a < 0:
            if r < 1 - clip_low:
                return -a * (1 - clip_low), 0.0
            return -a * min(r, dual_clip), -a * min(r, dual_clip)
        if r > 1 + clip_high:
            return -a / (1 + clip_high), 0.0
        return -a * min(1 / r, dual_clip), -a * min(1 / r, dual_clip)

    return _each(case, token)


def cpgd(case: Case, clip_low, clip_high, drift, drift_cap) -> Result:
    def token(i, j, r, a):
        log_ratio = math.log(r)
        bounded = min(max(log_ratio, math.log(1 - clip_low)), math.log(1 + clip_high))
        cut = bounded * a < log_ratio * a
        pull = min(r - 1, drift_cap)
        return -min(log_ratio * a, bounded * a) + drift * pull * log_ratio, (
            0.0 if cut else -a
        ) + drift * pull

    return _each(case, token)


def spo(case: Case, epsilon) -> Result:
    def token(i, j, r, a):
        return -(r * a - abs(a) / (2 * epsilon) * (r - 1) ** 2), -(
            a - abs(a) / epsilon * (r - 1)
        ) * r

    return _each(case, token)


def pspo(case: Case, alpha) -> Result:
    def token(i, j, r, a):
        old = math.exp(case.old[i, j])
        smoothed = (1 - alpha) * r * old + alpha * old
        return -a * smoothed / old, -a * (1 - alpha) * r

    return _each(case, token)


def minpro(case: Case, weight_max) -> Result:
    def token(i, j, r, a):
        before = [math.exp(case.new[i, k] - case.old[i, k]) for k in range(j) if case.mask[i, k]]
        weight = min(r * min(before, default=1.0), weight_max)
        return -a * weight, -a * weight

    return _each(case, token)


def gtpo_weights(case: Case, conflict_weight) -> tuple[np.ndarray, np.ndarray]:
    """Weights and number of conflicts per response, by comparing every response with every other of
    its group.
    """
    weights, conflicts = np.ones(case.mask.shape), np.zeros(case.mask.shape, dtype=bool)
    places = [[j for j in range(case.mask.shape[1]) if row[j]] for row in case.mask]
    for i, own in enumerate(places):
        sign = np.sign(case.advantages[i, 0])
        others = [
            k
            for k in range(len(places))
            if case.group[k] == case.group[i] and np.sign(case.advantages[k, 0]) == -sign != 0
        ]
        for step in (1, -1):
            for n, j in enumerate(own[::step]):
                shared = [
                    k
                    for k in others
                    if n < len(places[k])
                    and case.tokens[k, places[k][::step][n]] == case.tokens[i, j]
                ]
                if not shared:
                    break
                weights[i, j] *= conflict_weight if sign > 0 else 0.0
                conflicts[i, j] = True
    return weights, conflicts


def gtpo(case: Case, conflict_weight, entropy_max, entropy_scale, divide_by_conflicts) -> Result:
    weights, conflicts = gtpo_weights(case, conflict_weight)

    def token(i, j, r, a):
        if entropy_max is not None:
            mean = np.mean(
                [case.entropy[i, k] for k in range(case.mask.shape[1]) if case.mask[i, k]]
            )
            a = a - entropy_scale * mean if mean <= entropy_max else 0.0
        a = a * weights[i, j] / (max(1, conflicts[i].sum()) if divide_by_conflicts else 1)
        return -a, -a

    return _each(case, token)


def rpg(case: Case, clip_low, clip_high, kl, kl_coef, dual_clip) -> Result:
    def token(i, j, r, a):
        w = min(max(r, 1 - clip_low), 1 + clip_high)
        pull = kl_coef * {
            "fkl": 1.0, "rkl": -w * (math.log(w) + 1), "ufkl": 1 - w, "urkl": -w * math.log(w),
        }[kl]  # fmt: skip
        if a > 0 and r >= 1 + clip_high:
            return -(1 + clip_high) * a - pull, 0.0
        if a <= 0 and r < 1 - clip_low:
            return -(1 - clip_low) * a - pull, 0.0
        if a <= 0 and r >= dual_clip:
            return -dual_clip * a - pull, 0.0
        return -r * a - pull, -r * a - pull

    return _each(case, token)


def _mean(case: Case, values: np.ndarray, i: int) -> float:
    return float(np.mean([values[i, j] for j in range(values.shape[1]) if case.mask[i, j]] or [0]))


def _clip_of(case: Case, changed: np.ndarray, clip_low, clip_high, dual_clip) -> Result:
    return _each(
        case,
        lambda i, j, r, a: _clip(r, changed[i, j], 1 - clip_low, 1 + clip_high, dual_clip),
    )


def bnpo(case: Case, reward_min, reward_max, weight_max, **clip) -> Result:
    n = len(case.mask)
    scores = [
        (_mean(case, case.advantages, i) - reward_min) / (reward_max - reward_min) for i in range(n)
    ]
    groups = {
        g: [scores[i] for i in range(n) if case.group[i] == g] for g in sorted(set(case.group))
    }
    means = {g: sum(found) / len(found) if len(found) > 1 else 0.0 for g, found in groups.items()}
    a = b = 1.0
    if len(means) > 1 and len(set(means.values())) > 1:
        mean = sum(means.values()) / len(means)
        variance = sum((p - mean) ** 2 for p in means.values()) / (len(means) - 1)
        size = mean * (1 - mean) / variance - 1
        a, b = max(1.0, 1 + size * mean / 3), max(1.0, 1 + size * (1 - mean) / 3)
    changed = np.zeros(case.mask.shape)
    for i in range(n):
        p = means[case.group[i]]
        beta = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
        density = p ** (a - 1) * (1 - p) ** (b - 1) / beta
        changed[i] = min(1 / density if density else math.inf, weight_max) * (scores[i] - p)
    return _clip_of(case, changed, **clip)


def empg(case: Case, k, k_future, zeta, **clip) -> Result:
    turns: list[list[tuple[int, int]]] = []
    for i, j in case.tokens_of_responses():
        if turns and turns[-1][-1] == (i, j - 1):
            turns[-1].append((i, j))
        else:
            turns.append([(i, j)])
    means = [sum(case.entropy[at] for at in turn) / len(turn) for turn in turns]
    low, high = min(means), max(means)
    level = [(mean - low) / (high - low + 1e-8) for mean in means]
    scale = [math.exp(-k * x) for x in level]
    average = sum(scale) / len(scale) + 1e-8
    changed = np.zeros(case.mask.shape)
    for n, turn in enumerate(turns):
        for at in turn:
            changed[at] = case.advantages[at] * scale[n] / average
            if n + 1 < len(turns) and turns[n + 1][0][0] == turn[0][0]:
                changed[at] += zeta * math.exp(-k_future * level[n + 1])
    changed -= sum(changed[turn[0]] for turn in turns) / len(turns)
    return _clip_of(case, changed, **clip)


def d3s(
    case: Case, sample_share, sample_share_end, top_share, top_share_end, progress=0.0, **clip
) -> Result:
    """The responses by trying every subset."""
    samples = sample_share + progress * (sample_share_end - sample_share)
    share = top_share + progress * (top_share_end - top_share)
    present = [i for i in range(len(case.mask)) if case.mask[i].any()]
    of = {i: _mean(case, case.advantages, i) for i in present}
    size = max(1, math.floor(round(samples * len(present), 9)))
    kept = max(
        combinations(present, size), key=lambda rows: round(np.var([of[i] for i in rows]), 9)
    )
    where = [(i, j) for i, j in case.tokens_of_responses() if i in kept]
    count = math.ceil(round(share * len(where), 9))
    chosen = sorted(where, key=lambda at: -abs(case.advantages[at]) * case.entropy[at])[:count]
    changed = np.zeros(case.mask.shape)
    for at in chosen:
        changed[at] = case.advantages[at] * case.mask.sum() / count
    return _clip_of(case, changed, **clip)


def pacs(case: Case, beta, balance) -> Result:
    n = len(case.mask)
    good = [_mean(case, case.advantages, i) > 0 for i in range(n)]
    summed = [
        beta * sum(case.new[i, j] - case.old[i, j] for j in range(case.mask.shape[1])
                   if case.mask[i, j])
        for i in range(n)
    ]  # fmt: skip
    others = [[j for j in range(n) if case.group[j] == case.group[i] and j != i] for i in range(n)]

    def less_others(values, i):
        return values[i] - sum(values[j] for j in others[i]) / max(1, len(others[i]))

    errors = []
    for i in range(n):
        labels = [good[j] for j in (i, *others[i])]
        weight = len(labels) / (2 * labels.count(good[i])) if len(set(labels)) > 1 else 1.0
        errors.append(
            (weight if balance else 1.0) * (good[i] - 1 / (1 + math.exp(-less_others(summed, i))))
        )
    return _each(
        case, lambda i, j, r, a: (-beta * less_others(errors, i), -beta * less_others(errors, i))
    )
