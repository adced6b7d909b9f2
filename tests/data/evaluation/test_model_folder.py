# SPDX-License-Identifier: Apache-2.0
"""A model that is not whole is refused in a sentence with the file, before anything loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from capo_verl.data.evaluation.model_folder import INDEX, TOKENIZERS, find_model
from tests.helpers.tiny_model import make_tiny_qwen2


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_tiny_qwen2(folder)
    return folder


@pytest.fixture
def model(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


REWARD = "capo_verl.data.rewards.math_answers"


def refusal(model: Path) -> str:
    with pytest.raises(ValueError, match="--model") as refused:
        find_model(str(model))
    message = str(refused.value)
    assert message.startswith(f"--model {model}: ") and "\n" not in message
    return message


def test_a_whole_model(model):
    assert find_model(str(model)) == str(model)


DAMAGE = {
    "empty": (lambda data: b"", "is cut off (0 bytes)"),
    "a few bytes": (lambda data: data[:5], "is cut off (5 bytes)"),
    "within the header": (lambda data: data[:100], "is cut off (100 bytes)"),
    "within the data": (lambda data: data[:-1], "by its header"),
    "too long": (lambda data: data + b"x", "by its header"),
    "a header of something else": (
        lambda data: data[:8] + b"x" * (len(data) - 8), "has a damaged header"
    ),
    "a length of anything": (lambda data: b"\xff" * 8 + data[8:], "is cut off"),
    "a list": (lambda data: (2).to_bytes(8, "little") + b"[]", "has a damaged header"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights(model, damage):
    change, said = DAMAGE[damage]
    file = model / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    message = refusal(model)
    assert str(file) in message and said in message
    assert message.endswith(": copy or save it again")


def test_missing_shard(model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / INDEX).write_text(json.dumps({"weight_map": shards}))
    assert f"{model / shards['b']} is missing, though {INDEX} names it" in refusal(model)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": []}', "{}", "\ud800"])
def test_damaged_index(model, content):
    (model / INDEX).write_text(content, errors="surrogatepass")
    assert str(model / INDEX) in refusal(model)


def test_damaged_configuration(model):
    (model / "config.json").write_text('{"model_type": ')
    assert f"{model / 'config.json'} is no JSON (" in refusal(model)


def test_missing_tokenizer(model):
    for name in TOKENIZERS:
        (model / name).unlink(missing_ok=True)
    assert f"{model} has no tokenizer (tokenizer.json, " in refusal(model)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "null", '{"added_tokens": []}'])
def test_damaged_tokenizer(model, content):
    from capo_verl.data.evaluation.generation import load_tokenizer

    (model / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="its tokenizer cannot be loaded") as refused:
        load_tokenizer(str(model))
    assert str(refused.value).startswith(f"--model {model}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("command", [
    ("calibrate", "--data", "{data}", "--model", "{model}", "--reward", "{reward}:compute_score"),
    ("evaluate", "--data", "{data}", "--model", "{model}", "--output", "{model}/out"),
])  # fmt: skip
def test_both_commands_say_so(model, tmp_path, capsys, command):
    from capo_verl.commands.main import main
    from capo_verl.data.prepare import write_parquet
    from capo_verl.data.rows import make_row
    from capo_verl.data.templates import TEMPLATES

    data = tmp_path / "data.parquet"
    write_parquet(
        [
            make_row(
                "sums", f"{i}+1=", TEMPLATES["plain"], str(i + 1), "math", index=i, split="test"
            )
            for i in range(8)
        ],
        data,
    )
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert main([part.format(data=data, model=model, reward=REWARD) for part in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--model {model}: {file} has " in line
