# SPDX-License-Identifier: Apache-2.0
"""A small Qwen2 with a character tokenizer, in Hugging Face format."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|unk|>")
VOCAB_SIZE = 128
# One character names the role: every character is a token, and the model has to read it.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'][0] + '\n' + m['content'] + '<|im_end|>' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>a\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model.

    Heads and key-value heads divide by two, for tensor parallelism over two ranks.
    """

    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 256
    seed: int = 0

    def recipe(self) -> dict[str, Any]:
        """Everything the initial weights and the tokenizer depend on."""
        return {
            "architecture": "qwen2",
            "chat_template": CHAT_TEMPLATE,
            "vocab_size": VOCAB_SIZE,
            **asdict(self),
        }


def build_tokenizer(vocab_size: int = VOCAB_SIZE) -> Qwen2Tokenizer:
    """Byte-level BPE without merges: one token per printable ASCII character or newline.

    transformers 5 loads ``Qwen2Tokenizer`` for every model of type qwen2, whatever class was saved,
    so the character tokenizer has to be one. It writes a space as U+0120 and a newline as U+010A.

    Raises:
        ValueError: if the characters do not fit into ``vocab_size``.
    """
    from transformers import Qwen2Tokenizer

    characters = ["\u0120", *(chr(code) for code in range(33, 127)), "\u010a"]
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *characters))}
    if vocab_size < len(vocab):
        raise ValueError(f"vocab_size must be at least {len(vocab)}, got {vocab_size}")
    while len(vocab) < vocab_size:
        vocab[f"<|unused_{len(vocab)}|>"] = len(vocab)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        bos_token=None,
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(config: ModelConfig) -> Qwen2ForCausalLM:
    """The untrained model in float32; the same seed gives the same weights.

    The global generator is left alone.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = asdict(config)
    seed = sizes.pop("seed")
    hf_config = Qwen2Config(
        **sizes,
        vocab_size=VOCAB_SIZE,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<|im_end|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|pad|>"),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(hf_config)


def save(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Weights as safetensors, configuration and tokenizer."""
    from transformers.utils import logging

    shows_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # one small file; the bar would cut into our own display
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shows_bar:
            logging.enable_progress_bar()
