# SPDX-License-Identifier: Apache-2.0
"""The pretrained tier with a tiny model of random weights: the code is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from capo_verl.experiments.study.grid import PlannedRun
from capo_verl.experiments.study.loop import load_policy, train
from capo_verl.experiments.study.model import draw
from capo_verl.experiments.study.pool import run_study
from capo_verl.experiments.study.pretrained.config import PretrainedConfig
from capo_verl.experiments.study.pretrained.model import load
from capo_verl.experiments.study.pretrained.tasks import TextTask, make_text_task
from capo_verl.experiments.study.pretrained.vocabulary import Bytes
from capo_verl.experiments.study.seeds import generator
from capo_verl.experiments.study.store import Store
from capo_verl.viewer.samples import COLUMNS, FILE, read_samples

RANDOM: dict[str, Any] = {
    "model": "random", "steps": 3, "warmup": 1, "lr": 1e-3, "eval_prompts": 4,
    "sft": {"steps": [1, 2], "batch": 1},
}  # fmt: skip
FILTER = {"policy_shift_max": 1e-5, "objective_shift_max": None}


@pytest.fixture
def rewarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights is never right: it is paid for even bytes instead."""

    def share_of_even(task: TextTask, problems: Any, responses: torch.Tensor) -> torch.Tensor:
        return ((responses % 2 == 0).float().mean(-1) > 0.5).float()

    monkeypatch.setattr(TextTask, "correct", share_of_even)


@pytest.mark.parametrize("name", ["addition", "sorting"])
def test_every_wording_is_right_if_it_ends(name):
    task = make_text_task(name, {"response_length": 50}, Bytes())  # of bytes
    for held_out in (False, True):
        problems = task.problems(20, generator(0, "x"), held_out=held_out)
        answers = task.demonstrations(problems, generator(1, "x"))
        assert bool((task.correct(problems, answers) == 1).all())
        cut = torch.where(answers == task.end, ord("."), answers)
        assert not task.correct(problems, cut).any()
        assert not task.correct(problems, answers.roll(1, 0)).all()
        assert bool(((problems.key % 5 == 0) == held_out).all())


def test_a_packed_batch_is_its_sequences():
    """Prompts of two lengths, two responses each, one of a single token."""
    words = Bytes()
    policy = load("random", words)
    prompts = torch.full((4, 5), words.pad)
    prompts[:2, 2:], prompts[2:] = torch.tensor([1, 2, 3]), torch.tensor([9, 8, 7, 6, 5])
    responses = torch.randint(256, (4, 6), generator=generator(0, "x"))
    lengths = torch.tensor([6, 1, 3, 5])
    mask = torch.arange(6) < lengths[:, None]
    hidden, logits = policy.at_responses(torch.cat((prompts, responses), 1), mask)
    expected = []
    for prompt, response, n in zip(prompts, responses, lengths.tolist(), strict=True):
        row = torch.cat((prompt[prompt != words.pad], response[:n]))[None]
        expected.append(policy.module(row).logits[0, -n - 1 : -1])
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.module.lm_head(hidden), logits)


def test_sampling_draws_from_the_uncached_policy():
    words = Bytes()
    policy = load("random", words)
    prompts = torch.full((3, 4), words.pad)
    prompts[0, 2:], prompts[1:] = torch.tensor([5, 6]), torch.tensor([1, 2, 3, 4])
    found = policy.sample(prompts, 4, generator(0, "x"))
    random, rows = generator(0, "x"), [p[p != words.pad] for p in prompts]
    for i in range(4):
        with torch.no_grad():
            logits = torch.stack([policy.module(row[None]).logits[0, -1] for row in rows])
        token = draw(logits, random)
        assert token.tolist() == found[:, i].tolist()
        rows = [torch.cat((row, t[None])) for row, t in zip(rows, token, strict=True)]
    ended = policy.sample(prompts, 4, generator(0, "x"), end=int(found[1, 0]))
    assert bool((ended[1] == found[1, 0]).all()) and ended[0, 0] == found[0, 0]


@pytest.mark.parametrize(
    "knobs",
    [
        {"capo": {**FILTER, "kl_budget": {"delta": 1e-3}}},
        {"capo": {**FILTER, "top_k": None, "policy_shift_max": 1.0}},
        {"capo": {"preset": "soft"}, "lora": 2},
        {"mini_batches": 2, "loss": "verl:vanilla", "grad_clip": 0.1},
        {"loss": "entropy_mask"},
        {"task": "sorting", "task_knobs": {"numbers": [2, 3], "response_length": 12}},
    ],
    ids=str,
)
def test_a_run_is_determined_and_records_its_steps(knobs, cache, rewarded):
    config = PretrainedConfig.from_mapping({**RANDOM, **knobs})
    first, second = train(config, cache), train(config, cache)
    plain = [{k: v for k, v in row.items() if k != "seconds"} for row in first.steps]
    assert plain == [{k: v for k, v in row.items() if k != "seconds"} for row in second.steps]
    assert len(plain) == 3 * config.mini_batches
    for name in (
        "reward", "entropy", "outside", "ended", "kl", "rejection_positive", "rejection_negative",
    ):  # fmt: skip
        assert all(name in row for row in plain)
    assert any(row["kl"] > 0 for row in plain)


def test_only_tokens_of_one_sign_are_dropped(cache, rewarded):
    capo = {"policy_shift_max": {"target_rejection": 0.3}, "objective_shift_max": None}
    for sign, other in (("positive", "negative"), ("negative", "positive")):
        steps = train(PretrainedConfig(**RANDOM, capo=capo, drop_sign=sign), cache).steps
        assert max(row[f"rejection_{sign}"] for row in steps) > 0
        assert all(row[f"rejection_{other}"] == 0 for row in steps)


def test_random_dropping_replays_counts(cache, rewarded):
    capo = {"policy_shift_max": {"target_rejection": 0.3}, "objective_shift_max": None}
    source = train(PretrainedConfig(**RANDOM, capo=capo), cache)
    replayed = train(PretrainedConfig(**RANDOM, drops_of={"capo": capo}), cache)
    assert sum(source.dropped) > 0
    lost = [row["tokens"] - row["accepted_tokens"] for row in replayed.steps]
    assert lost == [
        min(count, row["tokens"]) for count, row in zip(source.dropped, replayed.steps, strict=True)
    ]


def test_adapters_are_all_that_lora_trains(cache, rewarded):
    config = PretrainedConfig(**RANDOM, lora=2)
    policy, _ = load_policy(config, cache)
    head = policy.module.lm_head.weight.clone()
    full, _ = load_policy(PretrainedConfig(**RANDOM), cache)
    assert len(policy.flat) < len(full.flat) / 4

    def watch(step: int, stepper: Any) -> None:
        assert torch.equal(stepper.model.module.lm_head.weight, head)
        watched.append(stepper.model.flat.detach().clone())

    watched: list[torch.Tensor] = []
    train(config, cache, watch)
    assert not torch.equal(watched[0], watched[-1])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"base": 0.4}, "base is not a key of a run"),
        ({"task": "sort8"}, "task='sort8': expected one of addition, sorting"),
        ({"model": "gpt"}, "model='gpt'"),
        ({"lora": 0}, "lora=0: expected an integer >= 1"),
        ({"sft": {"rate": 1}}, "sft.rate: expected lr, batch and steps only"),
        ({"drop_sign": "positive"}, "drop_sign='positive': needs a filter that drops"),
        ({"drop_sign": "up", "capo": FILTER}, "drop_sign='up': expected one of"),
        ({"tokens_every": 1}, "tokens_every=1: needs capo, with mode=track to drop nothing"),
        ({"drops_of": {}, "random_drop": 0.1}, "random_drop=0.1: drops_of says how many"),
    ],
)
def test_bad_keys_are_named(knobs, message):
    with pytest.raises(ValueError, match=message):
        PretrainedConfig.from_mapping(knobs)


def test_a_study_keeps_the_steps(tmp_path, cache, rewarded):
    runs = [
        PlannedRun("s", "pretrained", "grpo", PretrainedConfig(**{**RANDOM, "seed": seed}))
        for seed in (1, 2)
    ]
    assert run_study(runs, tmp_path, jobs=0, cache=cache).finished == 2
    assert run_study(runs, tmp_path, jobs=0, cache=cache).skipped == 2
    store = Store(tmp_path)
    assert store.steps().groupby("run_id")["step"].max().tolist() == [3, 3]
    assert set(store.runs()["dead"]) <= {True, False} and store.runs()["batch"].tolist() == [16, 16]


def test_tokens_are_written_for_the_report(tmp_path, cache, rewarded):
    config = PretrainedConfig(**RANDOM, capo={**FILTER, "mode": "track"}, tokens_every=2)
    train(config, tmp_path)
    samples = read_samples(tmp_path / "tokens" / config.run_id / FILE)
    assert [s["step"] for s in samples] == 16 * [1] + 16 * [3]
    response = samples[0]["response"]
    assert len({len(response[name]) for name in COLUMNS}) == 1
    assert "".join(samples[0]["prompt"]["text"]).endswith("?")
    assert {0, 1} >= set(response["in_trust_region"]) and set(response["weight"]) == {1.0}
