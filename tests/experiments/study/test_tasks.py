# SPDX-License-Identifier: Apache-2.0
"""Every task's scorer against a definition in words, and against the demonstrations."""

from __future__ import annotations

import pytest
import torch

from capo_verl.experiments.study.seeds import generator
from capo_verl.experiments.study.tasks import TASKS, make_task
from capo_verl.experiments.study.tasks.fillers import FIRST_FILLER
from capo_verl.experiments.study.tasks.sums import END


def draw(name: str, n: int = 64, **knobs):
    task, random = make_task(name, knobs), generator(1, "test")
    problems = task.problems(n, random)
    return task, problems, task.demonstrations(problems, random), random


@pytest.mark.parametrize("name", [n for n in TASKS if n != "gym"])
def test_demonstrations_are_right_and_noise_is_wrong(name):
    task, problems, answers, random = draw(name)
    assert answers.shape == (64, task.response_length) and problems.prompts.shape == (
        64,
        task.prompt_length,
    )
    assert int(max(answers.max(), problems.prompts.max())) < task.vocab_size
    assert task.correct(problems, answers).eq(1).all()
    assert task.mask(answers).any(-1).all()
    noise = torch.randint(10, answers.shape, generator=random)
    assert task.correct(problems, noise).sum() <= 1


def test_sort8_counts_places_when_graded():
    task, problems, answers, _ = draw("sort8", graded=True)
    answers = answers.clone()
    answers[0, :2] = 15
    assert task.reward(problems, answers)[0] == pytest.approx(6 / 8)
    assert task.correct(problems, answers)[0] == 0 and task.reward(problems, answers)[1] == 1


def test_sums_score_the_number_before_the_first_end():
    task, problems, answers, _ = draw("sums", terms=4)
    total = int(problems.prompts[0, 0::2].sum())
    assert int(problems.key[0, -1]) == total
    tens, ones = divmod(total, 10)
    response = answers[:1].clone()
    first = problems._replace(prompts=problems.prompts[:1], key=problems.key[:1])

    def score(*tokens: int) -> float:
        response[0] = 0
        response[0, : len(tokens)] = torch.tensor(tokens)
        return float(task.correct(first, response))

    assert score(tens, ones, END) == 1  # without intermediate results
    assert score(9, 9, tens, ones, END, 5, END) == 1  # what follows the end does not count
    assert score(tens, (ones + 1) % 10, END) == 0
    assert score(tens, ones, 3) == 0  # no end
    assert score(ones, END) == 0
    assert score(tens, 10 + ones % 2, END) == 0  # a sign is no digit


def test_fillers_are_ignored_wherever_they_stand():
    task, problems, answers, random = draw("fillers", share=0.5)
    filler = answers >= FIRST_FILLER
    share = float((filler & task.mask(answers)).sum() / task.mask(answers).sum())
    assert 0.4 < share < 0.6
    other = torch.where(
        filler, FIRST_FILLER + torch.randint(48, answers.shape, generator=random), answers
    )
    assert task.correct(problems, other).eq(1).all()
    # The mask ends with the eighth digit.
    for row, mask in zip(answers.tolist(), task.mask(answers).tolist(), strict=True):
        digits = [t < FIRST_FILLER for t in row]
        end = next(i for i in range(len(row)) if sum(digits[: i + 1]) == 8)
        assert mask == [i <= end for i in range(len(row))]
    never = torch.full_like(answers, FIRST_FILLER)
    assert task.correct(problems, never).eq(0).all()
    wrong = answers.clone()
    first = int((~filler[0]).float().argmax())
    wrong[0, first] = 9 if wrong[0, first] != 9 else 0
    assert task.correct(problems, wrong)[0] == 0


def test_fillers_with_share_zero_is_sorting():
    task, problems, answers, _ = draw("fillers", share=0.0)
    assert task.response_length == 8 and torch.equal(answers, problems.key)


def test_long_scores_the_last_list():
    task, problems, answers, random = draw("long")
    assert task.response_length == 120
    broken = answers.clone()
    broken[:, :90] = torch.randint(10, broken[:, :90].shape, generator=random)
    assert task.correct(problems, broken).eq(1).all()
    broken[:, -3] = (broken[:, -3] + 1) % 10
    assert task.correct(problems, broken).eq(0).all()
    # Pass i is the list with its first i + 1 digits sorted.
    digits = problems.key[0].tolist()
    for i in range(2, 12):
        expected = [*sorted(digits[:i]), *digits[i:], 10]
        assert answers[0, (i - 2) * 12 : (i - 1) * 12].tolist() == expected


def test_gym_is_scored_by_its_own_scorer():
    pytest.importorskip("reasoning_gym")
    task, problems, answers, random = draw("gym", n=32)
    assert task.correct(problems, answers).eq(1).all()
    held_out = task.problems(32, random, held_out=True)
    assert held_out.key.min() >= 18_000 > problems.key.max()
    # Another arrangement of the halves is a palindrome as well; swapping two different letters is
    # not.
    entry = task.entries[int(problems.key[0, 0])]
    text = entry["answer"]
    half = len(text) // 2
    swapped = text[:half][::-1] + text[half : len(text) - half] + text[:half]
    from capo_verl.experiments.study.tasks.gym import END as GYM_END
    from capo_verl.experiments.study.tasks.gym import encode

    response = torch.full((1, task.response_length), GYM_END)
    response[0, : len(swapped)] = encode(swapped)
    one = problems._replace(prompts=problems.prompts[:1], key=problems.key[:1])
    assert float(task.correct(one, response)) == 1
    assert float(task.scores(one, response)) == task.dataset.score_answer(swapped, entry) == 1
    response[0, 0] = (response[0, 0] + 1) % 26
    assert (
        float(task.scores(one, response)) == pytest.approx(0.02)
        and float(task.correct(one, response)) == 0
    )
    response[:] = 0  # no end token
    assert float(task.scores(one, response)) == 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="task='chess'"):
        make_task("chess")
    with pytest.raises(ValueError, match="colour"):
        make_task("sort8", {"colour": 1})
    with pytest.raises(ValueError, match="share=0.9"):
        make_task("fillers", {"share": 0.9})
