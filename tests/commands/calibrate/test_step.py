# SPDX-License-Identifier: Apache-2.0
"""Everything that is measured of a step, against a naive float64 version of step, filter and KL
divergence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from capo_verl.commands.calibrate.policy import from_hugging_face
from capo_verl.commands.calibrate.predicted import Predictions
from capo_verl.commands.calibrate.rollouts import Rollouts, group_advantages, pack
from capo_verl.commands.calibrate.step import measure_step, train_step
from capo_verl.config import CapoConfig
from tests.commands.calibrate.naive import NaiveRun
from tests.helpers.tiny_model import make_tiny_qwen2

LR, MAX_NORM = 1e-4, 1.0
MOVES = {
    "head": lambda name: "lm_head" in name,
    "last_layer": lambda name: (
        "lm_head" in name or "layers.2" in name or name == "model.norm.weight"
    ),
    "last_half": lambda name: "embed" not in name and "layers.0" not in name,
    "all": lambda name: True,
}


def rollouts(seed: int) -> Rollouts:
    g = torch.Generator().manual_seed(seed)
    lengths = (3, 5, 2, 4)
    responses = [torch.randint(0, 100, (n,), generator=g).tolist() for n in lengths]
    prompts = [[1, 2, 3], [1, 2, 3], [4, 5], [4, 5]]
    return pack(prompts, responses, torch.tensor([1.0, -0.5, 0.3, -0.8], dtype=torch.float64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_tiny_qwen2(tmp_path_factory.mktemp("model"), hidden_size=32, layers=3))


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.mark.parametrize("top_k", [None, 20])
def test_a_run_equals_the_naive_one(folder: Path, top_k: int | None) -> None:
    model = load(folder)
    naive = NaiveRun(model, LR, top_k, MAX_NORM)
    policy = from_hugging_face(model)
    optimizer = torch.optim.Adam(policy.parameters.values(), lr=LR)
    predictions = Predictions(policy, CapoConfig(top_k=top_k))
    for seed in range(3):
        batch = rollouts(seed)
        m_h, m_f = naive.shifts(batch).T
        tokens = naive.tokens(batch)
        old = naive.log_probs(batch)
        before = naive.step(batch)
        if seed == 1:  # a step that is not measured leaves the same state
            train_step(
                policy, batch, optimizer, predictions, max_gradient_norm=MAX_NORM, rows_per_pass=3
            )
            continue
        found = measure_step(
            policy, batch, optimizer, predictions, max_gradient_norm=MAX_NORM, rows_per_pass=3
        )
        np.testing.assert_allclose(found.tokens["policy_shift"], m_f, rtol=1e-6)
        np.testing.assert_allclose(found.tokens["objective_shift"], m_h, rtol=1e-6)
        actions, advantages = batch.actions.numpy(), found.tokens["advantage"]
        np.testing.assert_allclose(
            found.tokens["log_prob"], [lp[a] for lp, a in zip(old, actions, strict=True)], rtol=1e-9
        )
        np.testing.assert_allclose(
            found.tokens["entropy"], [-(np.exp(lp) @ lp) for lp in old], rtol=1e-9
        )
        np.testing.assert_allclose(
            found.tokens["hidden"], [t.h @ t.h for s in tokens for t in s], rtol=1e-9
        )
        for depth, moves in MOVES.items():
            new = naive.log_probs(batch, naive.moved_only(before, moves))
            kl = np.array([np.exp(p) @ (p - q) for p, q in zip(old, new, strict=True)])
            change = np.array([q[a] - p[a] for p, q, a in zip(old, new, actions, strict=True)])
            np.testing.assert_allclose(found.kl[depth], kl, rtol=1e-5, atol=1e-14)
            np.testing.assert_allclose(
                found.objective[depth], advantages * np.expm1(change), rtol=1e-6
            )
            ends = np.cumsum([len(s) for s in tokens])[:-1]
            assert found.batch[f"kl/{depth}"] == pytest.approx(
                np.mean([s.mean() for s in np.split(kl, ends)]), rel=1e-5
            )
            assert found.batch[f"kl_token_mean/{depth}"] == pytest.approx(kl.mean(), rel=1e-5)
    for name, p in naive.model.named_parameters():
        torch.testing.assert_close(policy.parameters[name].data, p.data, rtol=1e-8, atol=1e-12)


def test_the_heads_real_step_is_its_kl_to_second_order(folder: Path) -> None:
    policy = from_hugging_face(load(folder))
    optimizer = torch.optim.Adam(policy.parameters.values(), lr=1e-5)
    found = measure_step(
        policy,
        rollouts(0),
        optimizer,
        Predictions(policy, CapoConfig(top_k=None)),
        depths=("head",),
    )
    np.testing.assert_allclose(found.tokens["head_step"], found.kl["head"], rtol=2e-3)
    assert set(found.kl) == {"head"}


def test_batch_shift_of_the_exact_fisher_is_the_variance(folder: Path) -> None:
    """Along the mean gradient of a batch; before the first update P(g) = g."""
    model = load(folder)
    naive = NaiveRun(model, LR, None, MAX_NORM)
    policy = from_hugging_face(model)
    batch = rollouts(0)
    sequences = naive.tokens(batch)
    gradient, _ = naive.oracle.mean_gradient([t for s in sequences for t in s])

    def variance(token):
        u = gradient[token.rows] @ token.h
        return 0.5 * LR**2 * (token.pi @ u**2 - (token.pi @ u) ** 2)

    expected = np.mean([np.mean([variance(t) for t in s]) for s in sequences])
    _, shifts = Predictions(policy, CapoConfig(top_k=None)).evaluate(
        batch, policy.hidden(batch).detach(), LR
    )
    assert shifts["policy_shift_exact"] == pytest.approx(expected, rel=1e-9)
    assert shifts["policy_shift"] == pytest.approx(
        naive.oracle.set_shifts(sequences, LR)[1], rel=1e-9
    )
    assert shifts["objective_shift"] == pytest.approx(
        naive.oracle.set_shifts(sequences, LR)[0], rel=1e-9
    )


def test_a_tied_embedding_stays_unless_everything_moves(tmp_path: Path) -> None:
    folder = Path(make_tiny_qwen2(tmp_path, hidden_size=32, layers=2, tie_word_embeddings=True))
    model = load(folder)
    naive = NaiveRun(model, LR, None, MAX_NORM)
    policy = from_hugging_face(model)
    assert policy.tied
    batch = rollouts(0)
    old = naive.log_probs(batch)
    hidden = [t.h for s in naive.tokens(batch) for t in s]
    naive.step(batch)
    optimizer = torch.optim.Adam(policy.parameters.values(), lr=LR)
    found = measure_step(
        policy,
        batch,
        optimizer,
        Predictions(policy, CapoConfig(top_k=None)),
        depths=("head", "all"),
    )
    weight = naive.model.get_output_embeddings().weight.detach()
    logits = torch.from_numpy(np.array(hidden)) @ weight.T
    kl = [np.exp(p) @ (p - q) for p, q in zip(old, logits.log_softmax(-1).numpy(), strict=True)]
    np.testing.assert_allclose(found.kl["head"], kl, rtol=1e-5)
    everything = [np.exp(p) @ (p - q) for p, q in zip(old, naive.log_probs(batch), strict=True)]
    np.testing.assert_allclose(found.kl["all"], everything, rtol=1e-5)


def test_which_parameters_move_at_each_depth(folder: Path) -> None:
    policy = from_hugging_face(load(folder))
    for depth, moves in MOVES.items():
        assert {n for n in policy.parameters if policy.moves(n, depth)} == {
            n for n in policy.parameters if moves(n)
        }
    with pytest.raises(
        ValueError, match="depth='top': expected one of head, last_layer, last_half, all"
    ):
        policy.moves("lm_head.weight", "top")


def test_capped_logits_are_refused(folder: Path) -> None:
    model = load(folder)
    forward = model.forward

    def capped(**inputs):
        output = forward(**inputs)
        output.logits = output.logits.tanh()
        return output

    model.forward = capped
    with pytest.raises(ValueError, match="changes the output of its LM head"):
        from_hugging_face(model)


def test_rollouts() -> None:
    batch = rollouts(0)
    weights = batch.token_weights("seq-mean-token-mean")
    np.testing.assert_allclose(weights, np.repeat([1 / 12, 1 / 20, 1 / 8, 1 / 16], [3, 5, 2, 4]))
    np.testing.assert_allclose(batch.token_weights("token-mean"), np.full(14, 1 / 14))
    part = batch.part(slice(2, 4))
    assert part.input_ids.shape == (2, 6)
    assert part.actions.tolist() == batch.actions.tolist()[8:]
    with pytest.raises(ValueError, match="aggregation='sum'"):
        batch.token_weights("sum")
    with pytest.raises(ValueError, match="begin with a prompt"):
        pack([[]], [[1, 2]], torch.zeros(1))
    advantages = group_advantages(
        torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    )
    std = np.std([1, 0, 0], ddof=1)
    np.testing.assert_allclose(
        advantages, [*((np.array([1, 0, 0]) - 1 / 3) / (std + 1e-6)), 0, 0, 0]
    )
