# SPDX-License-Identifier: Apache-2.0
"""Series that verl does not log: held-out accuracy, completions and accepted tokens so far."""

from __future__ import annotations

import re
from collections.abc import Mapping

from capo_verl.viewer.series import Run, Series

ACCURACY, REWARD = "held-out accuracy", "training reward"
COMPLETIONS, ACCEPTED = "completions so far", "accepted tokens so far"
HELD_OUT = (re.compile(r"val-core/.+/acc/mean@\d+"), re.compile(r"val-core/.+/reward/mean@\d+"))
"""verl's names, in the order of preference."""
THRESHOLD = "capo/policy_threshold"
TRAINING = ("critic/score/mean", "critic/rewards/mean")


def is_source(metric: str) -> bool:
    """True for a logged metric that accuracy or reward is derived from."""
    return metric in TRAINING or any(pattern.fullmatch(metric) for pattern in HELD_OUT)


def add_derived(run: Run) -> None:
    """Add the series of this module for which the run has what they need.

    These are :data:`ACCURACY`, :data:`REWARD`, :data:`COMPLETIONS`, :data:`THRESHOLD` and
    :data:`ACCEPTED`.
    """
    for name, series in (
        (ACCURACY, _held_out(run.series)),
        (REWARD, next((run.series[key] for key in TRAINING if key in run.series), None)),
        (COMPLETIONS, _completions(run)),
    ):
        if name not in run.series and series is not None and series.steps:
            run.series[name] = series
    _add_threshold(run)
    accepted = _accepted_tokens(run)
    if ACCEPTED not in run.series and accepted is not None:
        run.series[ACCEPTED] = accepted


def _add_threshold(run: Run) -> None:
    """Add a fixed tau_F, from the configuration, if the run measured m_F.

    The run itself logs a tau_F that adapts.
    """
    fixed = [
        value
        for key, value in (run.config or {}).items()
        if key.endswith("policy_loss.capo.policy_shift_max")
    ]
    measured = run.series.get("capo/policy_shift_p50")
    if (
        THRESHOLD not in run.series
        and measured is not None
        and fixed
        and isinstance(fixed[0], int | float)
    ):
        run.series[THRESHOLD] = Series(
            list(measured.steps), [float(fixed[0])] * len(measured.steps)
        )


def _held_out(series: Mapping[str, Series]) -> Series | None:
    """Mean over the held-out sets, at the steps at which all of them were measured.

    It has a gap where one of them has.
    """
    for pattern in HELD_OUT:
        sets = [found.at() for key, found in series.items() if pattern.fullmatch(key)]
        if sets:
            steps = sorted(set.intersection(*(set(at) for at in sets)))
            return Series(steps, [sum(at[step] for at in sets) / len(sets) for step in steps])
    return None


def _steps(run: Run) -> list[int]:
    return sorted({step for series in run.series.values() for step in series.steps})


def _completions(run: Run) -> Series | None:
    """Completions so far, from the configuration or from the logged lengths.

    Without a configuration, a step's tokens are divided by the mean length of a prompt with its
    response; a step without them counts as the next one that has them.
    """
    steps, config = _steps(run), run.config or {}
    batch, n = config.get("data.train_batch_size"), config.get("actor_rollout_ref.rollout.n")
    if isinstance(batch, int) and isinstance(n, int):
        return Series(steps, [float(batch * n * step) for step in steps])
    names = ("perf/total_num_tokens", "prompt_length/mean", "response_length/mean")
    if any(name not in run.series for name in names):
        return None
    tokens, prompt, response = (run.series[name].known() for name in names)
    so_far, counted, found = 0.0, 0, Series()
    for step in steps:
        if step in tokens and step in prompt and step in response and prompt[step] + response[step]:
            so_far += round(tokens[step] / (prompt[step] + response[step])) * (step - counted)
            counted = step
        found.steps.append(step)
        found.values.append(so_far)
    return found


def _accepted_tokens(run: Run) -> Series | None:
    """Response tokens so far that the loss was computed on, each counted once.

    All of them count without CAPO, with ``mode=track``, with soft weights, and once the guard has
    stopped the filter.
    """
    if COMPLETIONS not in run.series or "response_length/mean" not in run.series:
        return None
    completions = run.series[COMPLETIONS].known()
    lengths = run.series["response_length/mean"].known()
    filters = not any(
        (key.endswith("policy_loss.capo.mode") and value == "track")
        or (key.endswith("policy_loss.capo.weighting") and value != "hard")
        for key, value in (run.config or {}).items()
    )
    rejected = (
        run.series["capo/rejection_rate"].known()
        if filters and "capo/rejection_rate" in run.series
        else {}
    )
    stopped = run.series.get("capo/filter_stopped", Series()).known()
    rejected = {step: 0.0 if stopped.get(step) else share for step, share in rejected.items()}
    so_far, before, found = 0.0, 0.0, Series()
    for step, total in sorted(completions.items()):
        so_far += (total - before) * lengths.get(step, 0.0) * (1 - rejected.get(step, 0.0))
        before = total
        found.steps.append(step)
        found.values.append(so_far)
    return found
