# SPDX-License-Identifier: Apache-2.0
"""The warm start is a function of its recipe, and the cache never hands out anything incomplete."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("reasoning_gym")

from capo_verl.cpu.quickstart import model, sft, task
from capo_verl.data import cache

TASK = task.TaskConfig(test_size=4, train_size=4, sft_size=40)
MODEL = model.ModelConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1)
RECIPE = sft.SftConfig(steps=6, batch_size=4, warmup_steps=2)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def warm_start(root: Path, recipe: sft.SftConfig = RECIPE, progress=None) -> tuple[Path, bool]:
    return sft.warm_start(TASK, MODEL, recipe, progress, root)


def test_same_recipe_same_bytes(tmp_path):
    (first, first_cached), (second, second_cached) = (
        warm_start(tmp_path / "a"),
        warm_start(tmp_path / "b"),
    )
    assert (first_cached, second_cached) == (False, False)
    assert first.name == second.name
    assert weights(first) == weights(second)


def test_second_use_comes_from_the_cache(tmp_path):
    first, _ = warm_start(tmp_path)
    second, cached = warm_start(tmp_path, progress=lambda *_: pytest.fail("trained again"))
    assert cached and first == second


def test_another_recipe_is_another_model(tmp_path):
    first, _ = warm_start(tmp_path)
    second, cached = warm_start(
        tmp_path, sft.SftConfig(steps=6, batch_size=4, warmup_steps=2, seed=1)
    )
    assert not cached
    assert first.name != second.name
    assert weights(first) != weights(second)


def test_interrupted_build_leaves_nothing_that_counts(tmp_path):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_start(tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert warm_start(tmp_path)[1] is False


@pytest.mark.parametrize(
    "damage", ["truncated weights", "missing file", "no manifest", "another recipe"]
)
def test_damaged_folder_is_rebuilt(tmp_path, damage):
    folder, _ = warm_start(tmp_path)
    expected = weights(folder)
    if damage == "truncated weights":
        (folder / "model.safetensors").write_bytes(expected[:100])
    elif damage == "missing file":
        (folder / "config.json").unlink()
    elif damage == "no manifest":
        (folder / cache.MANIFEST).unlink()
    else:
        manifest = json.loads((folder / cache.MANIFEST).read_text())
        manifest["recipe"]["sft"]["seed"] = 99
        (folder / cache.MANIFEST).write_text(json.dumps(manifest))
    again, cached = warm_start(tmp_path)
    assert again == folder and not cached
    assert weights(again) == expected
    assert warm_start(tmp_path)[1] is True


def test_training_learns(tmp_path):
    losses = []
    warm_start(
        tmp_path,
        sft.SftConfig(steps=60, batch_size=8, warmup_steps=5, learning_rate=1e-2, typo_rate=0.0),
        lambda *step: losses.append(step),
    )
    assert [step for step, _, _ in losses] == [10, 20, 30, 40, 50, 60]
    assert losses[-1][2] < losses[0][2] < 4.85, "log(128) is what guessing costs"


def test_typos_start_where_the_recipe_says():
    entries = task.generate(TASK)["sft"]
    batches = list(sft.demonstrations(entries, sft.SftConfig(steps=100, batch_size=20)))
    answers = {entry["metadata"]["word"]: entry["answer"] for entry in entries}

    def wrong(batch):
        return sum(
            answer != answers[prompt[0]["content"].split()[-1]] for prompt, answer in batch
        ) / len(batch)

    assert [wrong(batch) for batch in batches[:60]] == [0.0] * 60
    assert (
        0.5 < sum(wrong(batch) for batch in batches[60:]) / 40 < 0.65
    )  # swapping equal letters changes nothing


def test_a_typo_changes_one_place():
    rng = random.Random(0)
    kinds = {len(sft.with_typo("abcdef", rng)) for _ in range(50)}
    assert kinds == {5, 6, 7}


def test_labels_cover_the_answer_and_its_end_only():
    tokenizer = model.build_tokenizer()
    ids, labels = sft.collate(
        [([{"role": "user", "content": "x"}], "ab"), ([{"role": "user", "content": "yy"}], "c")],
        tokenizer,
    )
    assert tokenizer.decode(ids[0][labels[0] >= 0]) == "ab<|im_end|>"
    assert tokenizer.decode(ids[1][labels[1] >= 0]) == "c<|im_end|>"
    assert torch.equal(ids[labels >= 0], labels[labels >= 0])
