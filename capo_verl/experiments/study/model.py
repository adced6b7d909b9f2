# SPDX-License-Identifier: Apache-2.0
"""A 100K-parameter causal transformer, with a key-value cache for sampling.

Plain PyTorch, made for one core.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the tiny tier's model."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4


class Block(nn.Module):
    """Pre-norm attention with rotary positions, and a GELU MLP of four times the width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.hidden
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor | None = None, start: int = 0
    ) -> Tensor:
        """The block's output for ``x [B, T, H]`` at positions ``start..start+T``.

        ``cache [2, B, heads, max, H/heads]`` receives keys and values.
        """
        b, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        (q, k), v = _rotate(qkv[:2], cos, sin), qkv[2]
        if cache is not None:
            cache[0, :, :, start : start + t] = k
            cache[1, :, :, start : start + t] = v
            k, v = cache[:, :, :, : start + t]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class TinyTransformer(nn.Module):
    """A transformer with logits ``[..., V]`` of an untied LM head without bias.

    All parameters are views of one flat vector, ``flat``, and so are their gradients,
    ``flat.grad``: clipping, Adam and a step back are each one operation.

    Args:
        vocab_size: V.
        max_length: longest prompt plus response.
        seed: of the initial parameters.
    """

    def __init__(
        self, vocab_size: int, max_length: int, seed: int = 0, config: ModelConfig | None = None
    ):
        super().__init__()
        self.config = config = config or ModelConfig()
        self.vocab_size, self.hidden_size = vocab_size, config.hidden
        self.embed = nn.Embedding(vocab_size, config.hidden)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.hidden)
        self.lm_head = nn.Linear(config.hidden, vocab_size, bias=False)
        self.cos: Tensor
        self.sin: Tensor
        self._initialise(torch.Generator().manual_seed(seed))
        dim = config.hidden // config.heads
        frequency = 1000.0 ** (-torch.arange(0, dim, 2) / dim)
        angle = torch.outer(torch.arange(max_length), frequency)
        self.register_buffer("cos", torch.cat((angle, angle), -1).cos(), persistent=False)
        self.register_buffer("sin", torch.cat((angle, angle), -1).sin(), persistent=False)
        self.flat = flatten(self.parameters())

    @property
    def gradient(self) -> Tensor:
        """Gradient of ``flat``, of its size, float32; it stays one tensor from the start."""
        assert self.flat.grad is not None
        return self.flat.grad

    def _initialise(self, generator: torch.Generator) -> None:
        for name, p in self.named_parameters():
            if name == "embed.weight":
                nn.init.normal_(p, generator=generator)
            elif p.dim() == 2:
                depth = (
                    math.sqrt(2 * self.config.layers)
                    if name.endswith(("out.weight", "down.weight"))
                    else 1.0
                )
                nn.init.normal_(p, std=0.08 / depth, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, T, H]`` at the LM head, and logits ``[B, T, V]``."""
        t = tokens.shape[1]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:t], self.sin[:t])
        x = self.norm(x)
        return x, self.lm_head(x)

    def response(self, tokens: Tensor, prompt_length: int) -> tuple[Tensor, Tensor]:
        """Hidden states ``[B, T, H]`` and logits ``[B, T, V]`` of the response.

        They predict ``tokens[:, prompt_length:]``.
        """
        hidden, logits = self(tokens[:, :-1])
        return hidden[:, prompt_length - 1 :], logits[:, prompt_length - 1 :]

    def at_responses(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[N, H]`` and logits ``[N, V]`` of the response tokens in the mask."""
        hidden, logits = self.response(tokens, tokens.shape[1] - mask.shape[1])
        return hidden[mask], logits[mask]

    @torch.inference_mode()
    def sample(
        self, prompts: Tensor, length: int, generator: torch.Generator, end: int | None = None
    ) -> Tensor:
        """Sample ``length`` tokens after every prompt, at temperature 1.

        Args:
            prompts: ``[B, P]``.
            end: token after which a response does not matter; sampling stops when every response
                has one.

        Returns:
            ``[B, length]``; what follows ``end`` is arbitrary.
        """
        b, p = prompts.shape
        config = self.config
        cache = torch.empty(
            config.layers, 2, b, config.heads, p + length, config.hidden // config.heads
        )
        responses = torch.full((b, length), 0 if end is None else end)
        x, start, done = prompts, 0, torch.zeros(b, dtype=torch.bool)
        for i in range(length):
            t = x.shape[1]
            h = self.embed(x)
            for block, kept in zip(self.blocks, cache, strict=True):
                h = block(h, self.cos[start : start + t], self.sin[start : start + t], kept, start)
            token = draw(self.lm_head(self.norm(h[:, -1])), generator)
            responses[:, i] = token
            if end is not None:
                done |= token == end
                if done.all():
                    break
            x, start = token[:, None], start + t
        return responses


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token ``[B]`` of every row of ``logits [B, V]``, at temperature 1."""
    probs = logits.softmax(-1)
    # argmax of p / Exp(1) is a draw from p: one pass, no cumulative sums.
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


def flatten(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Make parameters, and their gradients, views of one vector and of its gradient.

    Returns:
        The vector, with ``grad``.
    """
    parameters = list(parameters)
    flat = torch.cat([p.detach().flatten() for p in parameters]).requires_grad_()
    flat.grad = torch.zeros_like(flat)
    offset = 0
    for p in parameters:
        n = p.numel()
        p.data = flat.detach()[offset : offset + n].view(p.shape)
        p.grad = flat.grad[offset : offset + n].view(p.shape)
        offset += n
    return flat
