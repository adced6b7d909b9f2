# SPDX-License-Identifier: Apache-2.0
"""The reward function for every file that ``capo-verl data`` writes.

Math-verify judges mathematics, reasoning-gym its own problems.

    reward.custom_reward_function.path=pkg://capo_verl.data.rewards.math_answers
    reward.custom_reward_function.name=compute_score
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from capo_verl.data.gym import SOURCE_PREFIX
from capo_verl.data.rewards.extraction import MAX_ANSWER_CHARS, final_answer
from capo_verl.data.rewards.notation import spelling
from capo_verl.data.rewards.pool import ELSEWHERE, Verdict, pool

WORKERS = 2
"""Processes per reward worker of verl (of which there are ``reward.num_workers``, 8 by default)."""
TIMEOUT_SECONDS = 5.0
MAX_PLAIN_CHARS = 20_000
"""Longest response in characters that may be an answer as a whole (``answer_format=plain``)."""
PREDICTION_CHARS = 200
REMEMBERED = 20_000
"""Verdicts that are kept: the answers of a group are often the same."""

_verdicts: OrderedDict[tuple[Any, ...], Verdict] = OrderedDict()
_lock = threading.Lock()


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    partial_credit: bool = True,
    workers: int | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Reward of one response.

    verl calls it in threads; the answer is judged in a process of its own (``pool.py``).

    Args:
        data_source: the row's column; ``reasoning_gym/<generator>`` goes to reasoning-gym's scorer.
        solution_str: the decoded response.
        ground_truth: the reference answer.
        extra_info: the row's; ``answer_format`` says where the answer is (``extraction.py``),
            ``entry`` is reasoning-gym's.
        timeout_seconds: for judging one answer. An answer that takes longer is wrong.
        partial_credit: False gives 0 to everything that has not reasoning-gym's full mark.
        workers: processes; by default ``$CAPO_REWARD_WORKERS``, or 2.

    Returns:
        ``score`` in [0, 1]; ``acc``: 1.0 for the full mark; ``pred``: the answer found, for
        majority votes; ``answered``: 1.0 if there was one; ``judge_failed``: 1.0 if it took too
        long, too much memory, could not be read, or no worker started. The same keys for every
        row, as verl requires.

    Raises:
        ValueError: for a row that this function cannot score.
        RuntimeError: if a package of the workers is missing.
    """
    extra = extra_info or {}
    gym = data_source.startswith(SOURCE_PREFIX)
    if gym and not extra.get("entry"):
        raise ValueError(
            f"{data_source}: extra_info.entry is missing: write the data with `capo-verl data`"
        )
    if not isinstance(ground_truth, str) or not ground_truth.strip():
        raise ValueError(
            f"{data_source}: reward_model.ground_truth={ground_truth!r} is not a non-empty string"
        )
    answer = final_answer(solution_str, extra.get("answer_format") or ("plain" if gym else "boxed"))
    limit = MAX_PLAIN_CHARS if extra.get("answer_format") == "plain" or gym else MAX_ANSWER_CHARS
    if answer is None:
        return _result(0.0, "", answered=False, failed=False)
    if len(answer) > limit:
        return _result(0.0, answer, answered=True, failed=True)
    if not gym and spelling(answer) == spelling(ground_truth):
        return _result(1.0, answer, answered=True, failed=False)
    request = {"answer": answer, "reference": ground_truth}
    if gym:
        request |= {"data_source": data_source, "entry": extra["entry"]}
    verdict = _judge(
        "reasoning_gym" if gym else "math", request, timeout_seconds, workers or _default_workers()
    )
    score = verdict.score if partial_credit else float(verdict.score >= 1.0)
    return _result(
        score, answer, answered=True, failed=bool(verdict.trouble), acc=float(verdict.score >= 1.0)
    )


def _judge(kind: str, request: dict[str, Any], seconds: float, workers: int) -> Verdict:
    key = (kind, *request.values())
    with _lock:
        if key in _verdicts:
            _verdicts.move_to_end(key)
            return _verdicts[key]
    verdict = pool(kind, workers).judge(request, seconds)
    # What ended a worker may have been something else on the machine; what took too long is not
    # tried again and again.
    if verdict.trouble not in ELSEWHERE:
        with _lock:
            _verdicts[key] = verdict
            if len(_verdicts) > REMEMBERED:
                _verdicts.popitem(last=False)
    return verdict


def _result(
    score: float, answer: str, *, answered: bool, failed: bool, acc: float | None = None
) -> dict[str, Any]:
    return {
        "score": score,
        "acc": score if acc is None else acc,
        "pred": re.sub(r"[\x00-\x1f]", " ", answer[:PREDICTION_CHARS]),
        "answered": float(answered),
        "judge_failed": float(failed),
    }


def _default_workers() -> int:
    text = os.environ.get("CAPO_REWARD_WORKERS", str(WORKERS))
    if not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"CAPO_REWARD_WORKERS={text!r}: a positive number of processes is expected"
        )
    return int(text)
