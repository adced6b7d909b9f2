# SPDX-License-Identifier: Apache-2.0
"""What the trainer writes for ``capo-verl report``: the right numbers at the right tokens, when
asked, and no waiting otherwise.
"""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace

import pytest
import torch
import verl  # noqa: F401  plugins first
from hydra import compose, initialize_config_module
from tensordict import TensorDict

from capo_verl import CapoConfig, CapoFilter
from capo_verl.engines.response import SAMPLE
from capo_verl.engines.token_samples import FILE, TokenSamples
from tests.helpers.syncs import recorded_syncs

WORDS = [f"w{i} " for i in range(10)]


def nested(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def batch(*samples: int) -> TensorDict:
    """Two samples: the responses 7 8 9 of advantage 1.5 with its middle token masked (a tool's
    output, say), and 7 of -2.
    """
    return TensorDict(
        {
            "input_ids": nested([5, 6, 7, 8, 9], [4, 5, 6, 7]),
            SAMPLE: torch.tensor(samples),
            "advantages": nested([1.5, 1.5, 1.5], [-2.0]),
            "response_mask": nested([1, 0, 1], [1]),
            "prompts": nested([5, 6], [4, 5, 6]),
            "responses": nested([7, 8, 9], [7]),
        },
        batch_size=[2],
    )


LOG_PROBS = nested(
    [0.0, math.log(0.5), math.log(0.9), math.log(0.25), 0.0], [0.0, 0.0, math.log(0.125), 0.0]
)


def found(rejected: list[int]) -> SimpleNamespace:
    """The filter's answer in the model's layout, one packed row. Position t is about token t + 1:
    the tokens of the response mask are at 1, 3 and 7.
    """
    verdict = torch.tensor([[0, 1, 0, 1, 0, 0, 0, 1, 0]]).bool()
    verdict[0, rejected] = False
    shift = torch.arange(9.0)[None] * 1e-5
    return SimpleNamespace(
        policy_shift=shift,
        objective_shift=-shift,
        in_trust_region=verdict,
        accepted=verdict,
        weights=verdict.float(),
    )


def make(tmp_path, **knobs) -> TokenSamples:
    config = CapoConfig(
        top_k=4,
        sample_tokens_dir=str(tmp_path / "run"),
        **{"sample_tokens_every": 10, "sample_tokens": 2, **knobs},
    )
    samples = TokenSamples(config, CapoFilter(config, 10, 3))
    samples.tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(WORDS[i] for i in ids))
    return samples


def one_step(
    samples: TokenSamples, step: int, *micro_batches: tuple[list[int], TensorDict]
) -> None:
    samples.begin(step)
    for rejected, data in micro_batches:
        samples.keep(found(rejected))
        samples.lay_out(lambda values: values[0])
        samples.add(LOG_PROBS, data)
    samples.write()
    samples.discard()


def read(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()]


def test_numbers_stand_at_their_tokens(tmp_path):
    one_step(make(tmp_path), 20, ([3], batch(3, 1)))
    first, other = read(tmp_path)
    assert (first["step"], first["sample"], first["chosen"], first["mode"]) == (
        21,
        3,
        "first",
        "filter",
    )
    assert first["prompt"] == {"ids": [5, 6], "text": ["w5 ", "w6 "]}
    assert first["response"] == {
        "ids": [7, 8, 9],
        "text": ["w7 ", "w8 ", "w9 "],
        "advantage": [1.5, 1.5, 1.5],
        "mask": [1, 0, 1],
        "probability": [0.5, 0.9, 0.25],
        "policy_shift": [1e-5, 2e-5, 3e-5],
        "objective_shift": [-1e-5, -2e-5, -3e-5],
        "in_trust_region": [1, 0, 0],
        "weight": [1, 0, 0],
    }
    assert (other["sample"], other["chosen"]) == (1, "most_rejected")
    assert other["prompt"]["ids"] == [4, 5, 6]
    assert (other["response"]["ids"], other["response"]["policy_shift"]) == ([7], [7e-5])
    assert (other["response"]["advantage"], other["response"]["probability"]) == ([-2.0], [0.125])


def test_half_are_the_first_and_half_those_with_most_rejected_tokens(tmp_path):
    one_step(
        make(tmp_path, sample_tokens=3),
        0,
        ([], batch(0, 1)),
        ([7], batch(2, 3)),
        ([1, 3], batch(4, 5)),
    )
    assert [(line["sample"], line["chosen"]) for line in read(tmp_path)] == [
        (0, "first"), (1, "first"), (4, "most_rejected"),
    ]  # fmt: skip


def test_only_every_nth_step_and_only_its_first_mini_batch(tmp_path):
    samples = make(tmp_path)
    for step in (0, 0, 1, 9, 10, 10, 11, 20):
        one_step(samples, step, ([], batch(0, 1)))
    assert [line["step"] for line in read(tmp_path)] == [1, 1, 11, 11, 21, 21]


@pytest.mark.parametrize(("every", "step"), [(None, 0), (10, 3)])
def test_steps_that_are_not_sampled_neither_wait_nor_write(tmp_path, every, step):
    samples, data = make(tmp_path, sample_tokens_every=every), batch(0, 1)
    out = found([3])
    with recorded_syncs() as syncs:
        samples.begin(step)
        samples.keep(out)
        samples.lay_out(lambda values: pytest.fail("laid out"))
        samples.add(LOG_PROBS, data)
        samples.write()
    assert syncs == []
    assert not (tmp_path / "run").exists()


def test_a_skipped_batch_is_not_written(tmp_path):
    samples = make(tmp_path)
    samples.begin(0)
    samples.keep(found([]))
    samples.lay_out(lambda values: values[0])
    samples.add(LOG_PROBS, batch(0, 1))
    samples.discard()
    samples.write()
    assert not (tmp_path / "run").exists()


def test_without_a_tokenizer_or_log_probs_the_ids_remain(tmp_path):
    samples = make(tmp_path)
    samples.tokenizer = None
    samples.begin(0)
    samples.keep(found([]))
    samples.lay_out(lambda values: values[0])
    samples.add(None, batch(0, 1))
    samples.write()
    response = read(tmp_path)[0]["response"]
    assert (response["ids"], response["text"], response["probability"]) == (
        [7, 8, 9],
        None,
        [None] * 3,
    )


def test_a_folder_that_cannot_be_written_to_is_a_warning_once(tmp_path, caplog):
    (tmp_path / "run").write_text("a file")
    samples = make(tmp_path)
    with caplog.at_level(logging.WARNING):
        for step in (0, 10):
            one_step(samples, step, ([], batch(0, 1)))
    assert len(caplog.records) == 1
    assert "set capo.sample_tokens_dir" in caplog.text


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (
            {"sample_tokens_every": 0},
            "capo.sample_tokens_every=0: expected an integer >= 1, or null for no samples",
        ),
        ({"sample_tokens": 0}, "capo.sample_tokens=0: expected an integer >= 1"),
        ({"sample_tokens_dir": 3}, "capo.sample_tokens_dir=3: expected a path, or null"),
        (
            {"sample_tokens_every": 5, "mode": "off"},
            "capo.sample_tokens_every=5 needs the shifts .*set capo.mode=track",
        ),
    ],
)
def test_wrong_knobs(knobs, message):
    with pytest.raises(ValueError, match=message):
        CapoConfig(**knobs)


def test_inside_verl_the_file_lies_beside_the_checkpoints():
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            overrides=["+capo=grpo", "trainer.default_local_dir=/somewhere/checkpoints"],
        )
    assert (
        config.actor_rollout_ref.actor.policy_loss.capo.sample_tokens_dir
        == "/somewhere/checkpoints"
    )
