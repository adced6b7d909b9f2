# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(scope="session")
def odd_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """125 tokens: two tensor-parallel ranks hold one row of padding."""
    from tests.helpers.tiny_model import make_tiny_qwen2

    return make_tiny_qwen2(tmp_path_factory.mktemp("odd-vocabulary"), vocab_size=125)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Four layers for two pipeline stages of two chunks, four key-value heads for four
    tensor-parallel ranks.
    """
    from tests.helpers.tiny_model import make_tiny_model

    made = {
        "untied": {},
        "tied": {"tie_word_embeddings": True},
        "odd-vocabulary": {"vocab_size": 125},
        "llama": {"model_type": "llama"},
        "qwen3": {"model_type": "qwen3"},
        "experts": {"model_type": "qwen3_moe"},
    }
    return {
        name: make_tiny_model(
            tmp_path_factory.mktemp(name),
            layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            **options,
        )
        for name, options in made.items()
    }
