# SPDX-License-Identifier: Apache-2.0
"""Tokenizer and model: every character the task can produce survives, and everything divides by
two.
"""

from __future__ import annotations

import string

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from capo_verl.cpu.quickstart import model, task


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    model.save(model.build_model(model.ModelConfig()), model.build_tokenizer(), folder)
    return folder


def test_round_trip_of_all_printable_characters(saved):
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    for text in [string.printable[:95], "a b\nc", *string.ascii_letters, "Backward: Abc"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == model.VOCAB_SIZE


def test_round_trip_of_the_whole_task(saved):
    pytest.importorskip("reasoning_gym")
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    splits = task.generate(task.TaskConfig())
    for entry in (entry for entries in splits.values() for entry in entries[:500]):
        prompt = tokenizer.apply_chat_template(
            task.chat_prompt(entry), add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == prompt
        answer = tokenizer.encode(entry["answer"], add_special_tokens=False)
        assert tokenizer.decode(answer, skip_special_tokens=True) == entry["answer"]
        assert len(ids) <= 32 and len(answer) + 1 <= 12, "longer than the launcher's limits"


def test_chat_template_as_verl_applies_it(saved):
    tokenizer = transformers.AutoTokenizer.from_pretrained(saved)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>u\nHi<|im_end|><|im_start|>a\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_model_is_untied_float32_and_divides_over_two_ranks(saved):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
    config = loaded.config
    assert config.model_type == "qwen2"
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert loaded.dtype == torch.float32
    assert (saved / "model.safetensors").exists()
    sizes = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.intermediate_size,
        config.vocab_size,
    )
    assert all(size % 2 == 0 for size in sizes)
    assert 3e5 < loaded.num_parameters() < 2e6


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = model.build_model(model.ModelConfig(seed=7))
    assert torch.equal(torch.rand(3), expected)
    second = model.build_model(model.ModelConfig(seed=7)).state_dict()
    other = model.build_model(model.ModelConfig(seed=8)).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.state_dict()["lm_head.weight"], other["lm_head.weight"])
