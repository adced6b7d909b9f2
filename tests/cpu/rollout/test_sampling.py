# SPDX-License-Identifier: Apache-2.0
"""Sampling against Hugging Face's ``generate``, a full forward pass, and the probabilities
themselves.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from capo_verl.cpu.rollout.expert_choices import ExpertChoices
from capo_verl.cpu.rollout.sampling import SamplingRequest, generate_batch, process_logits

EOS = 2
PROMPTS = ([10, 20, 30], [40, 50, 60, 70, 80, 90, 11], [12], [5, 6, 7, 8])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model(tiny_qwen2: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()


def processed(logits: torch.Tensor, request: SamplingRequest) -> torch.Tensor:
    """Naive twin of ``process_logits`` for ``[vocab]``: temperature, top-k, top-p with plain Python
    sets.
    """
    logits = logits / (request.temperature or 1.0)
    order = logits.argsort(descending=True).tolist()
    if request.temperature and request.top_k > 0:
        order = order[: request.top_k]
    if request.temperature and request.top_p < 1:
        probs, kept, total = logits[order].softmax(-1).tolist(), [], 0.0
        for token, prob in zip(order, probs, strict=True):
            if total >= request.top_p:
                break
            kept.append(token)
            total += prob
        order = kept
    masked = torch.full_like(logits, -torch.inf)
    masked[order] = logits[order]
    return masked.log_softmax(-1)


def test_greedy_equals_generate(model) -> None:
    """In one batch of prompts of different lengths, and of limits of different lengths."""
    limits = (5, 12, 9, 1)
    requests = [
        SamplingRequest(p, n, temperature=0, stop_token_ids=[EOS])
        for p, n in zip(PROMPTS, limits, strict=True)
    ]
    for prompt, limit, completion in zip(
        PROMPTS, limits, generate_batch(model, requests), strict=True
    ):
        want = model.generate(
            torch.tensor([prompt]), max_new_tokens=limit, do_sample=False, eos_token_id=EOS
        )
        assert completion.token_ids == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (0, -1, 1.0),
        (1.0, -1, 1.0),
        (0.7, -1, 1.0),
        (1.3, 5, 1.0),
        (1.0, -1, 0.6),
        (0.8, 7, 0.5),
        (1.0, 10**6, 1.0),
    ],
)
def test_log_probs_equal_a_full_forward_pass(
    model, temperature: float, top_k: int, top_p: float
) -> None:
    requests = [SamplingRequest(p, 8, temperature, top_k, top_p) for p in PROMPTS]
    for request, completion in zip(
        requests, generate_batch(model, requests, generator=generator(3)), strict=True
    ):
        sequence = torch.tensor([*request.prompt_ids, *completion.token_ids])
        with torch.no_grad():
            logits = model(sequence[None]).logits[0]
        predictions = logits[len(request.prompt_ids) - 1 : -1]
        want = [
            processed(row, request)[t]
            for row, t in zip(predictions, completion.token_ids, strict=True)
        ]
        torch.testing.assert_close(
            torch.tensor(completion.log_probs), torch.stack(want), rtol=0, atol=1e-5
        )


def test_support_of_top_k_and_top_p() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(4, 1)  # 0.636 0.234 0.086 0.032 0.012
    log_probs = process_logits(
        logits, torch.ones(4), torch.tensor([2, -1, -1, 3]), torch.tensor([1.0, 0.6, 0.87, 0.5])
    )
    assert (log_probs > -torch.inf).sum(-1).tolist() == [2, 1, 2, 1]
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(4))


def test_every_row_has_its_own_parameters(model) -> None:
    """A batch that mixes greedy, restricted and free rows gives each row what it gets alone."""
    parameters = [(0, -1, 1.0), (1.0, 1, 1.0), (1.0, -1, 1.0), (0.5, 20, 0.9)]

    def requests() -> list[SamplingRequest]:
        return [
            SamplingRequest(p, 6, *parameter, generator=generator(seed))
            for seed, (p, parameter) in enumerate(zip(PROMPTS, parameters, strict=True))
        ]

    together = generate_batch(model, requests())
    alone = [generate_batch(model, [request])[0] for request in requests()]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    greedy = [
        generate_batch(model, [SamplingRequest(p, 6, temperature=0)])[0].token_ids for p in PROMPTS
    ]
    assert together[0].token_ids == greedy[0] and together[1].token_ids == greedy[1]
    assert together[2].token_ids != greedy[2]


def test_batch_composition_does_not_change_greedy_results(model) -> None:
    """With rows that leave early (compaction) and with the same prompt several times (shared
    prefill).
    """
    limits = [2, 10, 3, 10, 2, 2, 7]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(limits))]
    requests = [SamplingRequest(p, n, temperature=0) for p, n in zip(prompts, limits, strict=True)]
    for request, completion in zip(requests, generate_batch(model, requests), strict=True):
        (alone,) = generate_batch(model, [request])
        assert completion.token_ids == alone.token_ids
        torch.testing.assert_close(
            torch.tensor(completion.log_probs), torch.tensor(alone.log_probs), rtol=0, atol=1e-5
        )


def test_finished_rows_leave_the_computation(model) -> None:
    batches = []

    def spy(**kwargs):
        batches.append(len(kwargs["input_ids"]))
        return model(**kwargs)

    generate_batch(
        spy,
        [SamplingRequest(p, n, temperature=0) for p, n in zip(PROMPTS, (2, 2, 6, 6), strict=True)],
    )
    assert batches == [4, 4, 2, 2, 2, 2]
    batches.clear()
    generate_batch(spy, [SamplingRequest(PROMPTS[0], 2) for _ in range(5)])
    assert batches == [1, 5], "the prompt is prefilled once"


def test_limits_and_stop_tokens(model) -> None:
    (free,) = generate_batch(model, [SamplingRequest(PROMPTS[1], 8, temperature=0)])
    assert (len(free.token_ids), free.finish_reason) == (8, "length")
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    requests = [
        SamplingRequest(PROMPTS[1], 8, temperature=0, stop_token_ids=[127, stop]),
        SamplingRequest(PROMPTS[1], 5, temperature=0),
        SamplingRequest(PROMPTS[1], first + 1, temperature=0, stop_token_ids=[stop]),
    ]
    by_stop, by_length, both = generate_batch(model, requests)
    assert (by_stop.token_ids, by_stop.finish_reason) == (free.token_ids[: first + 1], "stop")
    assert (by_length.token_ids, by_length.finish_reason) == (free.token_ids[:5], "length")
    assert both.finish_reason == "stop"


def test_abort(model) -> None:
    answers = iter([False, False, True])
    (completion,) = generate_batch(
        model, [SamplingRequest(PROMPTS[0], 8)], should_stop=lambda: next(answers)
    )
    assert (len(completion.token_ids), completion.finish_reason) == (2, "aborted")


def test_seed(model) -> None:
    requests = [SamplingRequest(p, 8) for p in PROMPTS]
    one, two, three = (
        [c.token_ids for c in generate_batch(model, requests, generator=generator(seed))]
        for seed in (1, 1, 2)
    )
    assert one == two != three


def test_frequencies_match_probabilities() -> None:
    """Chi-square over 20000 draws of one token from a fixed distribution of eight, one of them
    impossible.
    """
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -torch.inf, 2.0, -1.0, 0.2])
    draws = 20_000

    class Fixed:
        def __call__(self, input_ids, **kwargs):
            cache = SimpleNamespace(batch_select_indices=lambda indices: None)
            return SimpleNamespace(
                logits=logits.expand(len(input_ids), 1, -1), past_key_values=cache
            )

    requests = [SamplingRequest([0], 1, temperature=0.9)] * draws
    counts = Counter(
        c.token_ids[0] for c in generate_batch(Fixed(), requests, generator=generator(0))
    )
    probs = (logits / 0.9).softmax(-1).tolist()
    assert counts[4] == 0
    chi_square = sum(
        (counts[t] - draws * p) ** 2 / (draws * p) for t, p in enumerate(probs) if p > 0
    )
    assert chi_square < 22.5, "the 99.9% quantile for six degrees of freedom"


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt_ids": []},
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_bad_requests(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingRequest(**{"prompt_ids": [1], "max_new_tokens": 1, **bad})


def test_experts_are_those_of_a_full_forward_pass(tmp_path):
    """Of the prompt and of all but the last sampled token, with a dense layer between; rows end at
    different times.
    """
    from transformers import AutoModelForCausalLM

    from tests.helpers.tiny_model import make_tiny_model

    path = make_tiny_model(tmp_path, "qwen3_moe", layers=3, mlp_only_layers=[1])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    choices = ExpertChoices(model)
    requests = [
        SamplingRequest(prompt, limit, stop_token_ids=[EOS])
        for prompt, limit in zip((*PROMPTS, PROMPTS[0]), (1, 2, 9, 5, 9), strict=True)
    ]
    completions = generate_batch(model, requests, generator=generator(0), choices=choices)
    for request, completion in zip(requests, completions, strict=True):
        tokens = [*request.prompt_ids, *completion.token_ids]
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
        expected = torch.stack([x.topk(2).indices for x in logits], dim=1)[:-1].short()
        assert completion.experts.shape == (len(tokens) - 1, 3, 2)
        assert torch.equal(completion.experts[:, [0, 2]], expected)
        assert not completion.experts[:, 1].any()


def test_a_model_without_experts_is_named(model):
    with pytest.raises(ValueError, match="replay=True: Qwen2ForCausalLM has no experts"):
        ExpertChoices(model)
