# SPDX-License-Identifier: Apache-2.0
"""The data are verl's schema, the splits are disjoint, and the reward is reasoning-gym's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pd = pytest.importorskip("pandas")
reasoning_gym = pytest.importorskip("reasoning_gym")

from capo_verl.cpu.quickstart import task
from capo_verl.data import gym

SMALL = task.TaskConfig(test_size=20, train_size=50, sft_size=70)


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    return task.generate(SMALL)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task.prepare_data(SMALL, tmp_path_factory.mktemp("cache"))[0]


def test_splits_have_the_requested_sizes_and_share_no_word(splits):
    words = {
        split: {entry["metadata"]["word"].lower() for entry in entries}
        for split, entries in splits.items()
    }
    assert {split: len(w) for split, w in words.items()} == {"test": 20, "train": 50, "sft": 70}
    assert not words["test"] & words["train"]
    assert not words["sft"] & (words["test"] | words["train"])


def test_held_out_words_do_not_depend_on_the_other_sizes(splits):
    assert (
        task.generate(task.TaskConfig(test_size=20, train_size=10, sft_size=5))["test"]
        == splits["test"]
    )


def test_parquet_has_verls_schema(data_dir, splits):
    for split, size in (("train", 50), ("test", 20)):
        rows = pd.read_parquet(data_dir / f"{split}.parquet").to_dict("records")
        assert len(rows) == size
        for index, (row, entry) in enumerate(zip(rows, splits[split], strict=True)):
            assert set(row) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
            assert row["data_source"] == "reasoning_gym/spell_backward"
            assert [dict(m) for m in row["prompt"]] == [
                {"role": "user", "content": f"Backward: {entry['metadata']['word']}"}
            ]
            assert row["reward_model"] == {"style": "rule", "ground_truth": entry["answer"]}
            assert (row["extra_info"]["index"], row["extra_info"]["split"]) == (index, split)
            assert json.loads(row["extra_info"]["entry"])["answer"] == entry["answer"]


def test_answers_are_the_reversed_word(splits):
    for entry in splits["train"]:
        assert entry["answer"] == entry["metadata"]["word"][::-1]


@pytest.mark.parametrize(
    "garble",
    [
        "{a}",
        "{a}x",
        "x{a}",
        "",
        " ",
        "{w}",
        "{a} {a}",
        "\n{a}",
        "answer: {a}",
        "(((",
        "\u00e9\u4e2d",
    ],
)
def test_reward_is_the_scorers(data_dir, garble):
    dataset = reasoning_gym.create_dataset("spell_backward", size=1)
    for row in pd.read_parquet(data_dir / "test.parquet").to_dict("records"):
        entry = json.loads(row["extra_info"]["entry"])
        response = garble.format(a=entry["answer"], w=entry["metadata"]["word"])
        expected = dataset.score_answer(response, entry)
        arguments = (
            row["data_source"],
            response,
            row["reward_model"]["ground_truth"],
            row["extra_info"],
        )
        right = response.lower() == entry["answer"].lower()
        assert gym.compute_score(*arguments) == {"score": expected, "acc": float(right)}
        assert gym.compute_score(*arguments, partial_credit=False) == {
            "score": float(right),
            "acc": float(right),
        }


def test_reward_serves_other_reasoning_gym_tasks():
    entry = reasoning_gym.create_dataset("chain_sum", seed=1, size=1)[0]
    info = {"entry": json.dumps(entry)}
    assert (
        gym.compute_score("reasoning_gym/chain_sum", entry["answer"], entry["answer"], info)["acc"]
        == 1.0
    )
    assert (
        gym.compute_score("reasoning_gym/chain_sum", "no idea", entry["answer"], info)["acc"] == 0.0
    )


def test_foreign_rows_are_refused():
    with pytest.raises(ValueError, match="reasoning_gym/<generator>"):
        gym.compute_score("openai/gsm8k", "1", "1", {"entry": "{}"})
    with pytest.raises(ValueError, match="extra_info.entry is missing"):
        gym.compute_score(task.DATA_SOURCE, "1", "1", {"index": 0})


def test_too_few_words_is_one_clear_sentence():
    with pytest.raises(ValueError, match="lower the split sizes or widen"):
        task.generate(
            task.TaskConfig(
                min_word_len=3, max_word_len=3, test_size=1000, train_size=1000, sft_size=1000
            )
        )


def test_verl_loads_the_reward_function_by_its_package_path():
    pytest.importorskip("verl")
    from verl.utils.import_utils import load_extern_object

    assert load_extern_object("pkg://capo_verl.data.gym", "compute_score") is gym.compute_score
