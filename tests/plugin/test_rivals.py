# SPDX-License-Identifier: Apache-2.0
"""The rivals through verl's own ``ppo_loss``, its mini-batches and its trainer's advantages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import verl  # noqa: F401  plugins first
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.config import McoreActorConfig

from capo_verl.config import CapoConfig
from capo_verl.engines.mixin import capo_config_of
from capo_verl.plugin import rival_inputs
from capo_verl.plugin.policy_loss import CapoPolicyLossConfig
from capo_verl.rivals import RIVALS
from tests.rivals import naive
from tests.rivals.naive import Case

PROMPT = 2


def nested(rows: list[Any]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(
        [torch.as_tensor(row) for row in rows], layout=torch.jagged
    )


def micro_batch(
    case: Case, **settings: Any
) -> tuple[dict[str, torch.Tensor], TensorDict, torch.Tensor]:
    """verl's engine output and micro-batch for a case, and the padded new log-probabilities as a
    leaf.

    The engine returns what it says about a token at the position before it.
    """
    lengths = [int(np.flatnonzero(row).max()) + 1 for row in case.mask]
    new = torch.tensor(case.new, dtype=torch.float64, requires_grad=True)

    def per_position(values: torch.Tensor) -> torch.Tensor:
        rows = [
            torch.nn.functional.pad(values[i, :n], (PROMPT - 1, 1)) for i, n in enumerate(lengths)
        ]
        return torch.nested.nested_tensor_from_jagged(
            torch.cat(rows), offsets=torch.tensor([0, *np.cumsum([PROMPT + n for n in lengths])])
        )

    def response(values: np.ndarray, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return nested(
            [torch.tensor(row[:n], dtype=dtype) for row, n in zip(values, lengths, strict=True)]
        )

    fields = {
        "input_ids": nested(
            [
                np.r_[np.zeros(PROMPT, int), row[:n]]
                for row, n in zip(case.tokens, lengths, strict=True)
            ]
        ),
        "prompts": nested([np.zeros(PROMPT, int) for _ in lengths]),
        "responses": response(case.tokens, torch.int64),
        "response_mask": response(case.mask, torch.int64),
        "old_log_probs": response(case.old),
        "advantages": response(case.advantages),
    }
    tokens = int(case.mask.sum())
    data = tu.get_tensordict(
        fields,
        {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": len(lengths), **settings},
    )
    output = {"log_probs": per_position(new), "entropy": per_position(torch.tensor(case.entropy))}
    return output, data, new


def actor(loss_mode: str, **policy_loss: Any) -> McoreActorConfig:
    return McoreActorConfig(
        rollout_n=1, ppo_micro_batch_size_per_gpu=1, loss_agg_mode="token-mean",
        policy_loss=CapoPolicyLossConfig(loss_mode=loss_mode, **policy_loss),
    )  # fmt: skip


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("entropy_mask", {"top_share": 0.3}, {}),
    ("lopti", {}, {rival_inputs.EPOCH: 0}),
    ("lopti", {"eta": 0.2}, {rival_inputs.EPOCH: 1}),
    ("bapo", {"target": 0.8}, {}),
    *[
        (name, {}, {})
        for name in (
            "advantage_reweighting",
            "dcpo",
            "aspo",
            "cpgd",
            "spo",
            "pspo",
            "minpro",
            "rpg",
        )
    ],
]


@pytest.mark.parametrize(("name", "knobs", "settings"), CASES)
def test_ppo_loss_of_verl_is_the_naive_loss(name, knobs, settings):
    from verl.workers.utils.losses import ppo_loss

    case = Case.random(11)
    output, data, new = micro_batch(case, **settings)
    config = actor(name, rival={"name": name, **knobs})
    loss, metrics = ppo_loss(config, output, data)
    more = {"epoch": settings[rival_inputs.EPOCH]} if settings else {}
    expected, gradient = getattr(naive, name)(case, **{**RIVALS[name].knobs, **knobs, **more})
    tokens = case.mask.sum()
    assert float(loss.detach()) == pytest.approx(expected.sum() / tokens, rel=1e-12)
    loss.backward()
    np.testing.assert_allclose(new.grad, gradient / tokens, rtol=1e-12, atol=1e-15)
    assert metrics["actor/pg_loss"].aggregate() == pytest.approx(float(loss.detach()))
    assert "actor/ppo_kl" in metrics
    assert rival_inputs.current() is None


def test_ppo_loss_leaves_other_losses_alone():
    from verl.workers.utils.losses import ppo_loss

    case = Case.random(11)
    results = []
    for function in (ppo_loss, ppo_loss.__wrapped__):
        output, data, new = micro_batch(case)
        loss, metrics = function(actor("vanilla"), output, data)
        loss.backward()
        results.append((loss.detach(), new.grad, {k: v.aggregate() for k, v in metrics.items()}))
    (a, grad_a, metrics_a), (b, grad_b, metrics_b) = results
    assert torch.equal(a, b) and torch.equal(grad_a, grad_b) and metrics_a == metrics_b


def test_missing_entropies_are_asked_for():
    from verl.workers.utils.losses import ppo_loss

    output, data, _ = micro_batch(Case.random(0))
    del output["entropy"]
    with pytest.raises(
        ValueError,
        match="this rival needs entropies: set actor_rollout_ref.actor.calculate_entropy=True",
    ):
        ppo_loss(actor("entropy_mask"), output, data)
    assert rival_inputs.current() is None


def test_a_loss_mode_without_a_block_has_the_papers_knobs():
    from verl.workers.utils.losses import ppo_loss

    case = Case.random(4)
    losses = [
        ppo_loss(actor("spo", **block), *micro_batch(case)[:2])[0]
        for block in ({}, {"rival": {"name": "spo"}})
    ]
    assert torch.equal(*losses)
    other = ppo_loss(actor("spo", rival={"name": "spo", "epsilon": 0.7}), *micro_batch(case)[:2])[0]
    assert abs(float(other) - float(losses[0])) > 1e-3


def test_without_capo_the_engine_is_verls_own():
    from functools import partial

    def found(**blocks):
        return capo_config_of(
            partial(lambda config: None, config=actor("dcpo", rival={"name": "dcpo"}, **blocks))
        )

    assert found() is None
    assert found(capo={}) == CapoConfig()


def test_mini_batches_carry_their_epoch():
    data = tu.get_tensordict({"x": torch.arange(6)}, {"temperature": 1.0})
    seen = [
        (tu.get_non_tensor_data(batch, rival_inputs.EPOCH, None), batch["x"].tolist())
        for batch in tu.make_iterator(data, 2, 2, seed=1, dataloader_kwargs={"shuffle": True})
    ]
    assert [epoch for epoch, _ in seen] == [0, 0, 0, 1, 1, 1]
    for part in (seen[:3], seen[3:]):
        assert sorted(x for _, xs in part for x in xs) == list(range(6))
    assert rival_inputs.EPOCH not in data.keys()  # noqa: SIM118


# ---- advantages of whole groups ----


class Queue:
    """verl's queue of one batch."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = fields

    def kv_batch_get(self, keys, partition_id, select_fields):
        return TensorDict(
            {name: self.fields[name] for name in select_fields}, batch_size=[len(keys)]
        )

    def kv_batch_put(self, keys, partition_id, fields):
        self.fields.update({name: fields[name] for name in fields.keys()})  # noqa: SIM118
        return "written"


# Of clip-free losses: minus the naive loss at ratio 1 is the advantage.
@pytest.mark.parametrize(
    ("name", "knobs", "metric"),
    [
        ("gtpo", {}, "conflict_share"),
        ("gtpo", {"entropy_max": None, "conflict_weight": 3.0}, "conflict_share"),
        ("bnpo", {"reward_min": -1.5, "reward_max": 2.0}, "group_weight"),
        ("empg", {"zeta": 0.4}, "turns"),
        ("d3s", {}, "selected_share"),
        ("pacs", {}, "cross_entropy"),
    ],
)
def test_the_trainers_advantages_become_the_rivals(name, knobs, metric):
    from tensordict import NonTensorData, NonTensorStack

    from capo_verl.plugin.rival_inputs import follow_advantages

    case = Case.random(10)
    case.new = case.old.copy()
    case.advantages += 0.01 * np.arange(len(case.advantages))[:, None]
    knobs = {**knobs, **({"reward_max": 2.1} if name == "bnpo" else {})}
    _, data, _ = micro_batch(case)
    fields = {name: data[name] for name in ("responses", "response_mask", "advantages")}
    lengths = data["responses"].offsets().diff().tolist()
    fields["entropy"] = nested([case.entropy[i, :n] for i, n in enumerate(lengths)])
    fields["uid"] = NonTensorStack(*[NonTensorData(f"prompt {g}") for g in case.group])
    queue = Queue(dict(fields))
    base = SimpleNamespace(
        PPOTrainer=type("Trainer", (), {"_compute_advantage": lambda self, batch, metrics: batch}),
        tq=queue, response_to_nested=lambda padded,
        mask: nested([padded[i, :n] for i, n in enumerate(lengths)]),
    )  # fmt: skip
    follow_advantages(base)

    class Batch(SimpleNamespace):
        def __len__(self):
            return len(self.keys)

    batch = Batch(keys=[str(i) for i in range(len(lengths))], partition_id="train")

    def compute(loss_mode, rival):
        trainer = base.PPOTrainer()
        trainer.global_steps, trainer.total_training_steps = 2, 5
        trainer.config = OmegaConf.create(
            {
                "actor_rollout_ref": {
                    "actor": {"policy_loss": {"loss_mode": loss_mode, "rival": rival}}
                }
            }
        )
        metrics: dict[str, float] = {}
        return trainer._compute_advantage(batch, metrics), metrics

    assert compute("vanilla", None) == (batch, {}) and queue.fields.keys() == fields.keys()
    if knobs.get("entropy_max", 0.7) is None:
        del queue.fields["entropy"]  # nobody asks for it
    written, metrics = compute(name, {"name": name, **knobs})
    assert written == "written" and metrics[f"actor/{metric}"] > 0
    more = {"progress": 0.25} if name == "d3s" else {}
    minus_loss, _ = getattr(naive, name)(case, **{**RIVALS[name].knobs, **knobs, **more})
    assert len(np.unique(minus_loss)) >= 3
    for i, row in enumerate(queue.fields["advantages"].unbind()):
        np.testing.assert_allclose(row, -minus_loss[i, : lengths[i]], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [name for name, rival in RIVALS.items() if rival.whole_groups])
def test_their_loss_in_verl_takes_the_advantages_as_they_are(name):
    from verl.workers.utils.losses import ppo_loss

    case = Case.random(11)
    output, data, new = micro_batch(case)
    ppo_loss(actor(name), output, data)[0].backward()
    gradient = -case.advantages * case.mask
    clip = RIVALS[name].whole_groups.split(RIVALS[name].knobs)[1]
    if clip:
        _, gradient = naive.advantage_reweighting(case, alpha=0.0, **clip)
    np.testing.assert_allclose(new.grad, gradient / case.mask.sum(), rtol=1e-12, atol=1e-15)
