# SPDX-License-Identifier: Apache-2.0
"""The pieces between verl's batch and the filter."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import verl  # noqa: F401  plugins first
from tensordict import TensorDict
from verl.workers.utils.padding import no_padding_2_padding, response_from_nested

from capo_verl import CapoConfig, CapoFilter
from capo_verl.core import collectives
from capo_verl.core.validation import TOKEN_PROBLEMS
from capo_verl.engines.filter_step import ACCEPTED, PENALTY, FilterStep
from capo_verl.engines.lm_head import HiddenStatesTap
from capo_verl.engines.nonfinite import NonFinite, describe
from capo_verl.engines.response import (
    SAMPLE,
    PackedResponse,
    accepted_response,
    mask_rejected,
    response_fields,
    without_other_voices,
)
from tests.helpers.syncs import recorded_syncs

PROMPTS, RESPONSES = (2, 3), (3, 1)
NAN = float("nan")


def nested(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


@pytest.fixture(params=["nested", "padded"])
def batch(request) -> TensorDict:
    """Two samples; the responses 1.5 1.5 1.5 with its middle token masked (a tool's output, say),
    and -2.
    """
    fields = {"input_ids": nested([5, 6, 7, 8, 9], [4, 5, 6, 7]), SAMPLE: torch.tensor([3, 1])}
    if request.param == "nested":
        fields |= {
            "advantages": nested([1.5, 1.5, 1.5], [-2.0]),
            "response_mask": nested([1, 0, 1], [1]),
            "old_log_probs": nested([-1.0, NAN, -1.0], [-1.0]),
            "prompts": nested([5, 6], [4, 5, 6]),
            "responses": nested([7, 8, 9], [7]),
        }
    else:
        fields |= {
            "advantages": torch.tensor(
                [[1.5, 1.5, 1.5, 9.0], [-2.0, 9.0, 9.0, 9.0]]
            ),  # 9: padding, never read
            "response_mask": torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]),
            "old_log_probs": torch.tensor([[-1.0, NAN, -1.0, NAN], [-1.0, NAN, NAN, NAN]]),
            "prompts": torch.tensor([[0, 5, 6], [4, 5, 6]]),
            "responses": torch.tensor([[7, 8, 9, 0], [7, 0, 0, 0]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]]),
        }
    return TensorDict(fields, batch_size=[2])


def test_response_fields_land_on_their_tokens(batch):
    with recorded_syncs() as syncs:
        values = response_fields(batch).values()
    assert syncs == []
    assert values[:, 0].tolist() == [0, 0, 1.5, 1.5, 1.5, 0, 0, 0, -2.0]
    assert values[:, 1].tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 1]
    assert values[:, 2].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_decisions_come_back_to_the_responses(batch):
    # Position t of the engine's output belongs to token t + 1: the responses' decisions start one
    # before them.
    per_position = nested([0.0, 1.0, 1.0, 0.0, 7.0], [0.0, 0.0, 0.0, 7.0])  # 7: about no token
    with recorded_syncs() as syncs:
        accepted = accepted_response(per_position, batch)
        kept = mask_rejected(batch, accepted)
    assert syncs == []
    if accepted.is_nested:
        assert torch.equal(
            accepted.values(), response_from_nested(per_position, batch["response_mask"]).values()
        )
        assert torch.equal(accepted.offsets(), batch["response_mask"].offsets())
    else:
        assert torch.equal(accepted, no_padding_2_padding(per_position, batch))
    mask = kept["response_mask"]
    rows = [row.tolist() for row in mask.unbind()] if mask.is_nested else mask.tolist()
    assert [row[:n] for row, n in zip(rows, RESPONSES, strict=True)] == [[1, 0, 0], [0]]
    original = batch["response_mask"]
    assert int(original.values().sum() if original.is_nested else original.sum()) == 3  # untouched


def test_what_is_said_of_a_tools_tokens_is_forgotten(batch):
    with recorded_syncs() as syncs:
        kept = without_other_voices(batch)
    assert syncs == []
    for name, own in (("advantages", [1.5, 1.5, -2.0]), ("old_log_probs", [-1.0] * 3)):
        field, mask = kept[name], kept["response_mask"]
        if field.is_nested:
            assert torch.equal(field.offsets(), batch[name].offsets())
            field, mask = field.values(), mask.values()
        assert field[mask > 0].tolist() == own and not field[mask == 0].any()
    untouched = batch["old_log_probs"]
    assert (untouched.values() if untouched.is_nested else untouched).isnan().any()


def test_verls_metrics_describe_all_tokens_and_the_loss_the_accepted_ones(batch):
    step = make_step(policy_shift_max=1.0)

    def loss_function(model_output, data):
        mask = data["response_mask"]
        total = mask.values().sum() if mask.is_nested else mask.sum()
        return total * model_output["scale"], {"actor/pg_loss": total, "actor/tokens": total}

    output = {
        ACCEPTED: nested([0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]),
        "scale": torch.tensor(2.0),
    }
    loss, metrics = step.wrap_loss(loss_function)(output, batch)
    assert float(loss) == 2.0
    assert int(metrics["actor/pg_loss"]) == 1
    assert int(metrics["actor/tokens"]) == 3
    assert ACCEPTED not in output  # dropped before Megatron stores the output


def test_soft_weights_scale_the_advantages_and_leave_the_mask(batch):
    step = make_step(policy_shift_max=1.0, weighting="soft")
    seen, lengths = [], []

    def loss_function(model_output, data):
        advantages, mask = data["advantages"], data["response_mask"]
        seen.append((advantages, mask))
        padded = data.select(
            "advantages", "response_mask"
        ).to_padded_tensor()  # as verl's ppo_loss does
        lengths.append((padded["advantages"].shape, padded["response_mask"].shape))
        total = (advantages.values() * mask.values() if mask.is_nested else advantages * mask).sum()
        return total, {"actor/pg_loss": total, "actor/advantages": total}

    # Position t says what is to become of token t + 1: half of the first, all of the third; a
    # quarter of the second sample's.
    output = {ACCEPTED: nested([0.0, 0.5, 0.0, 1.0, 0.0], [0.0, 0.0, 0.25, 0.0])}
    loss, metrics = step.wrap_loss(loss_function)(output, batch)
    assert float(loss) == 1.5 * (0.5 + 1.0) - 2.0 * 0.25 == float(metrics["actor/pg_loss"])
    assert (
        float(metrics["actor/advantages"]) == 1.5 + 1.5 - 2.0
    )  # verl's own metrics describe the batch as it is
    assert len({shape for pair in lengths for shape in pair}) == 1
    (whole, mask), (_, kept_mask) = seen
    tensors = (mask.values(), kept_mask.values()) if mask.is_nested else (mask, kept_mask)
    assert torch.equal(*tensors) and (whole.values() if whole.is_nested else whole).max() >= 1.5


@pytest.mark.parametrize(
    "loss_agg_mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_the_penalty_is_aggregated_like_the_policy_loss(batch, loss_agg_mode):
    """A loss whose token losses are the penalties themselves."""
    from functools import partial

    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.tensordict_utils import assign_non_tensor
    from verl.workers.config import ActorConfig

    assign_non_tensor(batch, dp_size=2, batch_num_tokens=7, global_batch_size=5)
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        loss_agg_mode=loss_agg_mode,
        loss_scale_factor=3,
    )
    penalty = nested([9.0, 0.5, 9.0, 2.0, 9.0], [9.0, 9.0, 4.0, 9.0])
    step, accepted = (
        make_step(policy_shift_max=1.0, policy_penalty=1.0),
        nested([0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]),
    )

    def loss_function(model_output, data, config):
        mask = data.select("response_mask").to_padded_tensor()["response_mask"].bool()
        losses = torch.zeros(mask.shape)
        losses[0, 0], losses[0, 2], losses[1, 0] = 0.5, 2.0, 4.0
        info = {
            "dp_size": 2,
            "batch_num_tokens": 7,
            "global_batch_size": 5,
            "loss_scale_factor": config.loss_scale_factor,
        }
        loss = agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=config.loss_agg_mode, **info)
        return loss, {"actor/pg_loss": loss}

    wrapped = step.wrap_loss(partial(loss_function, config=config))
    penalty.requires_grad_()
    loss, metrics = wrapped({ACCEPTED: accepted, PENALTY: penalty}, batch)
    assert float(loss.detach()) == pytest.approx(2 * float(metrics["actor/pg_loss"]), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, penalty)
    # The token at position 3 of the first sample was rejected; what is outside the responses never
    # counts.
    assert [bool(x) for x in gradient.values()] == [
        False,
        True,
        False,
        False,
        False,
        False,
        False,
        True,
        False,
    ]


def test_what_the_loss_reads_is_looked_at_inside_the_mask_only(batch):
    nonfinite = NonFinite(torch.device("cpu"))
    nonfinite.note_loss(torch.tensor(1.0), batch, batch[SAMPLE])
    assert nonfinite.agree(None) == []
    old = batch["old_log_probs"]
    (old.values()[3:] if old.is_nested else old[1]).fill_(
        -torch.inf
    )  # the second sample's only token
    nonfinite.note_loss(torch.tensor(NAN), batch, batch[SAMPLE])
    nonfinite.note_gradients([torch.ones(3), torch.tensor([1.0, NAN])])
    found = nonfinite.agree(None)
    assert [(f.what, f.times, f.sample) for f in found] == [
        ("old_log_probs are not finite", 1, 1),
        ("the loss is not finite", 1, 1),
        ("gradients are not finite", 1, None),
    ]
    assert describe(found[:1], 7) == (
        "optimizer step 7 is not usable: rank 0: old_log_probs are not finite, first in sample 1 "
        "of its mini-batch"
    )
    nonfinite.clear()
    assert nonfinite.agree(None) == []


def test_problems_of_tokens_are_noted_with_the_first_sample_concerned():
    nonfinite = NonFinite(torch.device("cpu"))
    none = torch.zeros(2, 3, dtype=torch.bool)
    problems = dict.fromkeys(TOKEN_PROBLEMS, none) | {
        "logits are not finite": torch.tensor([[0, 1, 0], [0, 1, 1]]).bool(),
        "sequence_ids are out of range": torch.tensor([[0, 0, 0], [1, 0, 0]]).bool(),
    }
    with recorded_syncs() as syncs:
        for samples in ([[5, 4, 5], [9, 9, 9]], [[8, 8, 8], [2, 7, 6]]):
            nonfinite.note_tokens(problems, torch.as_tensor(samples))
        nonfinite.note_tokens(dict.fromkeys(TOKEN_PROBLEMS, none[:, :0]), none[:, :0].long())
    assert {sync.operation for sync in syncs} == {"as_tensor"}  # this test's own
    assert [(f.what, f.times, f.sample) for f in nonfinite.agree(None)] == [
        ("logits are not finite", 6, 4),
        ("sequence_ids are out of range", 2, 2),
    ]


def test_a_gradient_norm_that_overflows_counts():
    nonfinite = NonFinite(torch.device("cpu"))
    nonfinite.note_gradients([torch.full((4,), 3e38)])
    assert [f.what for f in nonfinite.agree(None)] == ["gradients are not finite"]


def test_the_gather_has_the_documented_bytes(monkeypatch):
    sent = []
    monkeypatch.setattr(collectives, "gather", lambda x, group: sent.append(x.nbytes) or x)
    assert NonFinite(torch.device("cpu")).agree(None) == []
    page = Path(__file__).parents[2] / "docs" / "parallelism.md"
    assert f"do tensor-parallel ranks decide alike? | `{sent[0]}` |" in page.read_text()


def make_step(**knobs) -> FilterStep:
    config = CapoConfig(**{"top_k": 4, "objective_shift_max": None, **knobs})
    cpu = torch.device("cpu")
    tap = HiddenStatesTap(torch.nn.Identity())
    return FilterStep(CapoFilter(config, 8, 3), config, cpu, NonFinite(cpu), tap)


def evaluate_something(step: FilterStep) -> torch.Tensor:
    response = PackedResponse(
        torch.ones(1, 5),
        torch.ones(1, 5, dtype=torch.bool),
        torch.zeros(1, 5, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        5,
    )
    return step.evaluate(
        torch.randn(1, 5, 3), torch.randn(1, 5, 8), torch.zeros(1, 5, dtype=torch.int64),
        torch.ones(1, 5), response, 0.1
    )  # fmt: skip


def test_a_run_that_accepts_nothing_is_told_so_once(caplog):
    step = make_step(policy_shift_max=1e-30)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        for at in range(5):
            accepted = evaluate_something(step)
            assert not accepted.any()
            metrics = step.metrics()
            assert metrics["capo/nothing_accepted"] == 1.0
            assert step.optimizer_step() > 0
            step.discard()
            assert len(caplog.records) == (at >= 2)
    assert "raise capo.policy_shift_max or capo.objective_shift_max" in caplog.text


def test_a_filter_that_rejects_too_much_for_too_long_stops_and_says_so_once(caplog):
    step = make_step(policy_shift_max=1e-30, max_rejection=0.5, max_rejection_steps=2)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        for at in range(5):
            accepted = evaluate_something(step)
            assert bool(accepted.all()) == (at >= 2) == bool(accepted.any())
            metrics = step.metrics()
            assert metrics["capo/filter_stopped"] == float(at >= 2)
            assert metrics["capo/rejection_rate"] == 1.0  # still measured
            step.optimizer_step()
            step.discard()
            stopped = [record for record in caplog.records if "filters no more" in record.message]
            assert len(stopped) == (at >= 2)
    assert (
        "rejected more than 0.5 of the tokens in 2 optimizer steps in a row" in stopped[0].message
    )
    assert (
        len(caplog.records) == 1
    )  # nor that the policy does not move: since it has stopped, it does


def test_a_guard_beside_a_filter_that_only_tracks_says_nothing(caplog):
    step = make_step(policy_shift_max=1e-30, mode="track", max_rejection=0.5, max_rejection_steps=1)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        for at in range(4):
            evaluate_something(step)
            assert step.metrics()["capo/filter_stopped"] == float(at > 0)  # it would have
            step.optimizer_step()
            step.discard()
    assert not caplog.records


def test_a_threshold_is_reported_once_it_is_known():
    step = make_step(policy_shift_max={"target_rejection": 0.3})
    torch.manual_seed(0)
    known = []
    for _ in range(4):
        evaluate_something(step)
        known.append(step.metrics().get("capo/policy_threshold"))
        step.optimizer_step()
        step.discard()
    assert known[:2] == [None, None] and 0 < known[2] < 1 and known[3] != known[2]
