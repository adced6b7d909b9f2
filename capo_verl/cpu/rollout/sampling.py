# SPDX-License-Identifier: Apache-2.0
"""Batched sampling from a Hugging Face causal language model, in plain torch.

``model.generate`` takes one set of sampling parameters per batch and returns no log-probs of the
distribution it sampled from. Here every row has its own parameters, its own length and its own
random numbers, so that a row's tokens do not depend on the rows beside it, and finished rows leave
the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from capo_verl.cpu.rollout.expert_choices import ExpertChoices

COMPACT_BELOW = 0.75
"""Finished rows are dropped once the rows still running are fewer than this share of the batch."""


@dataclass
class SamplingRequest:
    """One completion to sample.

    Attributes:
        prompt_ids: at least one token id.
        max_new_tokens: at least 1; the stop token counts.
        temperature: 0 takes the most likely token, and `top_k` and `top_p` are then ignored.
        top_k: keep the `top_k` most likely tokens (and those tied with the last of them); 0 or less
            keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches `top_p`; 1
            keeps all.
        stop_token_ids: sampling ends with the first of these, which is part of the completion.
        generator: random numbers of this request; None takes those of the batch.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_token_ids: Sequence[int] = ()
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise ValueError("prompt_ids is empty")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")


@dataclass
class Completion:
    """Sampled tokens and their log-probs under the distribution they were sampled from.

    finish_reason: "stop" (ends with a stop token), "length", or "aborted".
    experts: ``[prompt + completion - 1, layers, experts per token]`` int16, chosen for every token
        that the model has seen; None unless asked for.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str
    experts: torch.Tensor | None = None


def process_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """Log-probs of the distribution that tokens are sampled from.

    The temperature comes first, then top-k, then top-p.

    Args:
        logits: ``[rows, vocab]``.
        temperature, top_k, top_p: ``[rows]``, with the meaning they have in
            :class:`SamplingRequest`.

    Returns:
        ``[rows, vocab]``, ``-inf`` outside the support. For temperature 0, the log-probs of the
        model.
    """
    greedy = temperature == 0
    logits = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    vocab = logits.shape[-1]
    top_k = torch.where(greedy | (top_k <= 0), vocab, top_k.clamp(max=vocab))
    top_p = torch.where(greedy, 1.0, top_p)
    if (top_k < vocab).any() or (top_p < 1).any():
        ordered, order = logits.sort(-1, descending=True)
        kth = ordered.gather(-1, (top_k - 1)[:, None])
        ordered = ordered.masked_fill(ordered < kth, -torch.inf)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # probability of all that is more likely
        ordered = ordered.masked_fill((before >= top_p[:, None]) & (top_p < 1)[:, None], -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return logits.log_softmax(-1)


def _sample(log_probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution at `uniform` ``[rows]``: one number in, one token out."""
    cdf = log_probs.double().exp().cumsum(-1)
    # Scaled to the last value, so that rounding can neither leave the range nor reach a token of
    # probability zero.
    tokens = torch.searchsorted(cdf, (uniform.double() * cdf[:, -1])[:, None], right=True)[:, 0]
    last = cdf.shape[-1] - 1 - (log_probs > -torch.inf).flip(-1).int().argmax(-1)
    return torch.minimum(tokens, last)


def _left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask ``[rows, longest prompt]``; all rows end in the same column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, (torch.arange(width) >= (width - lengths)[:, None]).long()


@torch.no_grad()
def generate_batch(
    model: Any,
    requests: Sequence[SamplingRequest],
    pad_id: int = 0,
    generator: torch.Generator | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    choices: ExpertChoices | None = None,
) -> list[Completion]:
    """Sample one completion per request.

    Requests with the same prompt share its prefill. Nothing is converted to Python before the last
    token is sampled.

    Args:
        model: a Hugging Face causal language model with a dynamic key-value cache, in eval mode.
        requests: the rows of the batch.
        pad_id: any token id; padding is masked.
        generator: random numbers for requests that bring none. Same generator state, same requests,
            same completions.
        should_stop: asked before every token; True ends all rows that still run, as "aborted".
        choices: of the model, to return the experts of every token.
    """
    rows = len(requests)
    limits = torch.tensor([request.max_new_tokens for request in requests])
    longest = int(limits.max())
    temperature = torch.tensor([float(request.temperature) for request in requests])
    top_k = torch.tensor([request.top_k for request in requests])
    top_p = torch.tensor([float(request.top_p) for request in requests])
    most = max(1, max(len(request.stop_token_ids) for request in requests))
    stops = torch.tensor(
        [[*r.stop_token_ids, *[-1] * (most - len(r.stop_token_ids))] for r in requests]
    )
    uniform = torch.zeros(rows, longest)
    for row, request in zip(uniform, requests, strict=True):
        row[: request.max_new_tokens].uniform_(generator=request.generator or generator)

    # Prefill every distinct prompt once, then give each row its copy of the cache.
    distinct = {tuple(request.prompt_ids): None for request in requests}
    index_of = {prompt: index for index, prompt in enumerate(distinct)}
    copies = torch.tensor([index_of[tuple(request.prompt_ids)] for request in requests])
    ids, mask = _left_pad(list(distinct), pad_id)
    width = ids.shape[1]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1
    )
    cache, logits = output.past_key_values, output.logits[:, -1].index_select(0, copies)
    cache.batch_select_indices(copies)
    mask = torch.cat(
        [mask.index_select(0, copies), torch.ones(rows, longest, dtype=mask.dtype)], dim=1
    )
    prompt_lengths = mask[:, :width].sum(-1)
    experts = None
    if choices is not None:
        of_prompts = choices.of_last_pass(len(distinct)).index_select(0, copies)
        later = of_prompts.new_zeros(rows, longest, *of_prompts.shape[2:])
        experts = torch.cat([of_prompts, later], dim=1)

    tokens = torch.full((rows, longest), pad_id)
    log_probs = torch.zeros(rows, longest)
    lengths = torch.zeros(rows, dtype=torch.long)
    stopped = torch.zeros(rows, dtype=torch.bool)
    # The request of each row still in the computation; some may have finished.
    running = torch.arange(rows)
    done = torch.zeros(rows, dtype=torch.bool)  # by row of the computation
    for step in range(longest):
        if should_stop():
            break
        step_log_probs = process_logits(
            logits, temperature[running], top_k[running], top_p[running]
        )
        sampled = _sample(step_log_probs, uniform[running, step])
        token = torch.where(temperature[running] == 0, step_log_probs.argmax(-1), sampled)
        live = running[~done]
        tokens[live, step] = token[~done]
        log_probs[live, step] = step_log_probs.gather(-1, token[:, None])[~done, 0]
        lengths[live] += 1
        hit_stop = (token[:, None] == stops[running]).any(-1)
        stopped[live] = hit_stop[~done]
        done = done | hit_stop | (step + 1 >= limits[running])
        left = int((~done).sum())
        if left == 0:
            break
        if left < COMPACT_BELOW * len(running):
            keep = (~done).nonzero()[:, 0]
            running, token, done = running[keep], token[keep], done[keep]
            cache.batch_select_indices(keep)
        logits = model(
            input_ids=token[:, None],
            attention_mask=mask[running, : width + step + 1],
            position_ids=(prompt_lengths[running] + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
        if choices is not None and experts is not None:
            experts[running, width + step] = choices.of_last_pass(len(running))[:, 0]

    columns = (tokens, log_probs, lengths, limits, stopped, prompt_lengths)
    completions = []
    for row, (of_row, log_probs_of_row, length, limit, stop, prompt) in enumerate(
        zip(*(column.tolist() for column in columns), strict=True)
    ):
        reason = "stop" if stop else "length" if length == limit else "aborted"
        seen = slice(width - prompt, width + max(length - 1, 0))
        chosen = None if experts is None else experts[row, seen].clone()
        completions.append(Completion(of_row[:length], log_probs_of_row[:length], reason, chosen))
    return completions
