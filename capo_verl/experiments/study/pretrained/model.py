# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model as a policy of the loop."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from capo_verl.experiments.study.model import draw, flatten
from capo_verl.experiments.study.pretrained.vocabulary import Vocabulary, model_folder


class TextPolicy:
    """A causal language model in float32 whose trained parameters are one vector.

    Args:
        module: ``LlamaForCausalLM`` or alike, with ``model`` and ``lm_head``.
        pad: token before the prompts.
        lora: rank of adapters on all linear layers but the LM head; None: all parameters.
    """

    def __init__(self, module: Any, pad: int, lora: int | None = None):
        self.module, self._pad = module.eval(), pad
        self.vocab_size, self.hidden_size = module.config.vocab_size, module.config.hidden_size
        if lora is not None:
            from peft import LoraConfig, get_peft_model

            # Changes the module in place.
            get_peft_model(
                module, LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear")
            )
        for parameter in module.parameters():
            if not parameter.requires_grad:
                parameter.grad = None
        self.flat = flatten(p for p in module.parameters() if p.requires_grad)

    @property
    def gradient(self) -> Tensor:
        """Gradient of ``flat``, of its size."""
        assert self.flat.grad is not None
        return self.flat.grad

    def at_responses(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[N, H]`` and logits ``[N, V]`` that predict the response tokens.

        Neighbours with the same prompt share a row, and the prompt in it.

        Args:
            tokens: ``[B, P + T]``, prompts padded on the left; mask: ``[B, T]`` bool, the first
                tokens of every response.
        """
        packed = pack(tokens, mask, self._pad)
        hidden = self.module.model(
            input_ids=packed.tokens,
            position_ids=packed.positions,
            attention_mask=packed.visible[:, None],
            use_cache=False,
        ).last_hidden_state
        hidden = hidden.flatten(0, 1)[packed.source]
        return hidden, self.module.lm_head(hidden)

    @torch.inference_mode()
    def sample(
        self, prompts: Tensor, length: int, generator: torch.Generator, end: int | None = None
    ) -> Tensor:
        """Sample ``length`` tokens after every prompt, at temperature 1.

        Args:
            prompts: ``[B, P]``, padded on the left.
            end: token that ends a response; those that have it are sampled no further.

        Returns:
            ``[B, length]``; ``end`` behind the end.
        """
        from transformers import DynamicCache

        unique, of_prompt = prompts.unique_consecutive(dim=0, return_inverse=True)
        responses = torch.full((len(prompts), length), 0 if end is None else end)
        cache, alive = DynamicCache(config=self.module.config), torch.arange(len(prompts))
        valid = unique != self._pad
        logits = self._next(unique, valid, cache)[of_prompt]
        cache.batch_select_indices(of_prompt)
        valid = valid[of_prompt]
        for i in range(length):
            token = draw(logits, generator)
            responses[alive, i] = token
            going = (token != (-1 if end is None else end)).nonzero()[:, 0]
            if i == length - 1 or len(going) == 0:
                break
            if len(going) < len(token):
                cache.batch_select_indices(going)
                alive, token, valid = alive[going], token[going], valid[going]
            valid = torch.cat((valid, torch.ones_like(valid[:, :1])), 1)
            logits = self._next(token[:, None], valid, cache)
        return responses

    def _next(self, tokens: Tensor, valid: Tensor, cache: Any) -> Tensor:
        """Logits ``[B, V]`` after the last of ``tokens [B, t]``; ``valid [B, all]`` so far."""
        positions = (valid.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        hidden = self.module.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=None if bool(valid.all()) else valid.long(),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.module.lm_head(hidden[:, -1])


class Packed(NamedTuple):
    """A batch with a row per prompt: the prompt, and the responses to it one after the other."""

    tokens: Tensor
    """``[G, n]``, padded on the right."""
    positions: Tensor
    """``[G, n]``."""
    visible: Tensor
    """``[G, n, n]`` bool: a token sees the prompt and its own response, up to itself."""
    source: Tensor
    """``[N]``: places in ``[G * n]`` that predict the response tokens."""


def pack(tokens: Tensor, mask: Tensor, pad: int) -> Packed:
    """Rows of neighbours that share a prompt; arguments as :meth:`TextPolicy.at_responses`."""
    prompt_length = tokens.shape[1] - mask.shape[1]
    prompts, responses = tokens[:, :prompt_length], tokens[:, prompt_length:].tolist()
    unique, group = prompts.unique_consecutive(dim=0, return_inverse=True)
    rows: list[list[int]] = [[t for t in prompt if t != pad] for prompt in unique.tolist()]
    lengths = [len(row) for row in rows]
    positions = [list(range(n)) for n in lengths]
    owners = [[-1] * n for n in lengths]
    source: list[tuple[int, int]] = []
    for i, (g, count) in enumerate(zip(group.tolist(), mask.sum(-1).tolist(), strict=True)):
        if count == 0:
            continue
        start, n = len(rows[g]), lengths[g]
        rows[g] += responses[i][: count - 1]  # nothing is predicted from the last
        positions[g] += range(n, n + count - 1)
        owners[g] += [i] * (count - 1)
        source += [(g, n - 1), *((g, at) for at in range(start, start + count - 1))]
    width = max(map(len, rows))

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([x + [value] * (width - len(x)) for x in lists])

    owner = padded(owners, -2)
    visible = (owner[:, None] == -1) | (owner[:, None] == owner[:, :, None])
    visible = visible & torch.ones(width, width, dtype=torch.bool).tril()
    where = torch.tensor([g * width + at for g, at in source], dtype=torch.int64)
    return Packed(padded(rows, pad), padded(positions, 0), visible, where)


def load(model: str, vocabulary: Vocabulary, lora: int | None = None) -> TextPolicy:
    """A model before any training here: ``smollm2``, or ``random`` of seed 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if model == "random":
        torch.manual_seed(0)
        module = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary.size, hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                tie_word_embeddings=True,
            )
        )  # fmt: skip
    else:
        module = LlamaForCausalLM.from_pretrained(
            model_folder(), dtype=torch.float32, attn_implementation="sdpa"
        )
    return TextPolicy(module, vocabulary.pad, lora)
