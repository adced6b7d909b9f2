# SPDX-License-Identifier: Apache-2.0
"""The example for TRL: its loss and gradients against a naive computation in float64, and against
TRL's own.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install '.[trl]'")

from trl import GRPOTrainer

from capo_verl import CapoConfig, CapoFilter
from tests.helpers.spawn import run_on_ranks
from tests.outside_verl.trl_cases import (
    ADAM,
    KNOBS,
    OPTIONS,
    Recorded,
    example,
    make_trainer,
    on_two_ranks,
)

OFF = {"top_k": 8, "policy_shift_max": None, "objective_shift_max": None}


class ToolMasks(Recorded):
    tool_masks = True


def naive_loss(model, call, mask, old_log_probs, normalizer):
    """GRPO's loss and the gradients of it, as its formula reads, in the dtype of the model."""
    logits = naive_head(model, call)[1]
    log_probs = (
        logits.log_softmax(-1).gather(-1, call.inputs["completion_ids"][..., None]).squeeze(-1)
    )
    old = log_probs.detach() if old_log_probs is None else old_log_probs.double()
    ratio, advantages = (log_probs - old).exp(), call.inputs["advantages"].double()[:, None]
    per_token = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    loss = sum(
        (row * kept).sum() / n for row, kept, n in zip(per_token, mask, normalizer, strict=True)
    )
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def naive_head(model, call):
    inputs = call.inputs
    out = model(
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        output_hidden_states=True,
    )
    first = inputs["prompt_ids"].shape[1] - 1
    return out.hidden_states[-1][:, first:-1], out.logits[:, first:-1] / OPTIONS["temperature"]


@pytest.mark.parametrize(
    "loss_type, tool_masks, iterations",
    [("grpo", False, 1), ("grpo", True, 1), ("bnpo", False, 1), ("dr_grpo", False, 1),
        ("dapo", False, 1), ("dapo", False, 2)],
)  # fmt: skip
def test_loss_and_gradients_equal_the_naive_ones(tmp_path, loss_type, tool_masks, iterations):
    """Decisions too: they come from a second filter, which is given whole logits of a float64 copy
    of the model, the learning rates of the linear schedule, and one step after every two
    micro-batches.
    """
    trainer = make_trainer(
        tmp_path,
        ToolMasks if tool_masks else Recorded,
        loss_type=loss_type,
        num_iterations=iterations,
    )
    trainer.train()
    assert len(trainer.calls) == 8
    model = example.tiny_policy()[0].double()
    capo = CapoFilter(CapoConfig(**KNOBS, **ADAM), vocab_size=32, hidden_size=64)
    shares = []
    for step in range(4):
        learning_rate = 3e-3 * (1 - step / 4)
        calls = trainer.calls[2 * step : 2 * step + 2]
        generated = sum(call.inputs["completion_mask"].sum() for call in calls)
        rejected = tokens = 0
        for call in calls:
            model.load_state_dict(call.weights)
            mask = call.inputs["completion_mask"].bool()
            if tool_masks:
                mask = mask & (call.inputs["completion_ids"] % 3 > 0)
            with torch.no_grad():
                hidden, logits = naive_head(model, call)
            ids, advantages = (
                call.inputs["completion_ids"],
                call.inputs["advantages"][:, None].double(),
            )
            accepted = capo.evaluate(hidden, logits, ids, advantages, mask, learning_rate).accepted
            rows = len(mask)
            normalizer = {
                "grpo": accepted.sum(1).clamp(min=1) * rows * 2,
                "bnpo": [accepted.sum() * 2] * rows,
                "dr_grpo": [rows * 8 * 2] * rows,
                "dapo": [generated] * rows,
            }[loss_type]
            old = call.inputs.get("old_per_token_logps")
            assert (old is None) == (iterations == 1)
            loss, gradients = naive_loss(model, call, accepted, old, normalizer)
            torch.testing.assert_close(call.loss.double(), loss, rtol=2e-5, atol=2e-6)
            for found, expected in zip(call.gradients, gradients, strict=True):
                torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-6)
            rejected, tokens = (
                rejected + (mask & ~accepted).sum().item(),
                tokens + mask.sum().item(),
            )
        capo.step()
        shares.append(rejected / tokens)
    logged = [entry["capo/rejection_rate"] for entry in trainer.state.log_history[:-1]]
    assert logged == pytest.approx(shares, abs=1e-12)
    assert all(0 < share < 1 for share in shares[:2])
    for name in ("exp_avg", "exp_avg_sq"):
        found, expected = trainer.capo.state_dict()[name], capo.state_dict()[name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("capo", [OFF, KNOBS | {"mode": "track"}], ids=["no thresholds", "track"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_without_rejection_it_trains_bit_for_bit_like_trls_own(tmp_path, capo, loss_type):
    options = {
        "loss_type": loss_type,
        "num_iterations": 2,
        "beta": 0.0,
        "top_entropy_quantile": 0.5,
    }
    ours = make_trainer(tmp_path, capo=capo, **options)
    ours.train()
    theirs = make_trainer(tmp_path, GRPOTrainer, capo=None, **options)
    theirs.train()
    before = example.tiny_policy()[0].state_dict()
    for (name, found), expected in zip(
        ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    assert not torch.equal(before["lm_head.weight"], ours.model.lm_head.weight)
    for found, expected in zip(
        ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True
    ):
        for key in ("loss", "grad_norm", "entropy", "clip_ratio/region_mean"):
            assert found[key] == expected[key], key
    assert ours.capo.state_dict()["step"] == 4


def test_what_no_token_passes_leaves_the_weights_alone(tmp_path):
    trainer = make_trainer(
        tmp_path, capo=KNOBS | {"objective_shift_min": 1e9}, weight_decay=0.0, max_steps=2
    )
    trainer.train()
    for name, weight in example.tiny_policy()[0].state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name]), name
    assert [entry["capo/rejection_rate"] for entry in trainer.state.log_history[:-1]] == [1, 1]


def test_evaluation_is_trls_own_and_leaves_the_filter_alone(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    before = deepcopy(trainer.capo.state_dict())
    torch.manual_seed(1)
    ours = trainer.evaluate()
    torch.manual_seed(1)
    trainer._compute_loss = lambda model, inputs: GRPOTrainer._compute_loss(trainer, model, inputs)
    theirs = trainer.evaluate()
    assert ours["eval_loss"] == theirs["eval_loss"] and not [key for key in ours if "capo" in key]
    trainer.capo.step()  # what evaluation had left behind would move the moments now
    after = trainer.capo.state_dict()
    assert after["step"] == before["step"] == 2
    assert torch.equal(after["exp_avg"], before["exp_avg"]) and torch.equal(
        after["exp_avg_sq"], before["exp_avg_sq"]
    )


def test_a_resumed_run_continues_bit_exactly(tmp_path):
    whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    found, expected = resumed.capo.state_dict(), whole.capo.state_dict()
    assert found["step"] == expected["step"] == 4
    assert torch.equal(found["exp_avg"], expected["exp_avg"]) and torch.equal(
        found["exp_avg_sq"], expected["exp_avg_sq"]
    )
    assert torch.equal(resumed.model.lm_head.weight, whole.model.lm_head.weight)


def test_a_step_that_the_scaler_leaves_out_is_forgotten(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=2)
    monkeypatch.setattr(
        type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda self: True)
    )
    trainer.train()
    assert trainer.capo.state_dict()["step"] == 0
    trainer.capo.step()
    assert trainer.capo.state_dict()["step"] == 0


def test_two_ranks_share_one_filter(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "MASTER_ADDR", "localhost"
    )  # accelerate asks for it, though the group is there
    first, second = run_on_ranks(on_two_ranks, 2, str(tmp_path))
    assert first["tokens"] != second["tokens"] and first["logged"] == second["logged"]
    assert first["moments"]["step"] == first["expected"]["step"] == 3
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(first["moments"][name], second["moments"][name])
        torch.testing.assert_close(
            first["moments"][name], first["expected"][name], rtol=1e-5, atol=1e-9
        )


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"policy_penalty": 0.1}, "capo.policy_penalty=0.1 is not implemented for TRL; leave it at "
        "0.0"),
        ({"mode": "track", "track_every": 2}, "capo.track_every=2 is not implemented for TRL; "
        "leave it at 1"),
        ({"on_nonfinite": "skip_batch"}, "capo.on_nonfinite='skip_batch' is not implemented for "
        "TRL; leave it at 'error'"),
        (
            {"weighting": "soft", "objective_shift_max": None},
            "capo.weighting='soft' is not implemented for TRL; leave it at 'hard'",
        ),
        ({"mode": "off"}, "capo.mode=off measures nothing: make no filter, or set capo.mode=track"),
    ],
)  # fmt: skip
def test_knobs_that_only_the_engines_know_are_refused(tmp_path, knobs, message):
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, capo=KNOBS | knobs)
    assert str(error.value) == message


def test_capped_logits_are_refused(tmp_path, monkeypatch):
    model, tokenizer = example.tiny_policy()
    model.config.final_logit_softcapping = 30.0
    monkeypatch.setattr(example, "tiny_policy", lambda: (model, tokenizer))
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path)
    assert str(error.value) == (
        "The model's final_logit_softcapping=30.0 changes what comes out of its LM head, which "
        "CAPO would not see; use a model without it"
    )


@pytest.mark.parametrize("what", ["_is_vlm", "is_fsdp_enabled", "is_deepspeed_enabled"])
def test_trainers_that_cannot_work_are_refused(tmp_path, monkeypatch, what):
    trainer = make_trainer(tmp_path)
    setattr(trainer, what, True)
    message = {"_is_vlm": "images are not passed on; use a text model"}.get(
        what, "it needs the whole LM head on each rank; use DDP"
    )
    with pytest.raises(ValueError) as error:
        example.refuse(trainer, trainer.capo.config)
    assert str(error.value) == f"CapoGRPOTrainer: {message}"


def test_adapters_are_refused(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, tokenizer = example.tiny_policy()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    monkeypatch.setattr(example, "tiny_policy", lambda: (model, tokenizer))
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path)
    assert (
        str(error.value)
        == "CapoGRPOTrainer: adapters leave the LM head as it is; train the model itself"
    )


def test_an_optimizer_which_the_filter_does_not_model_is_refused(tmp_path):
    with pytest.raises(ValueError) as error:
        make_trainer(tmp_path, optim="adafactor").train()
    assert str(error.value) == (
        "capo.optimizer_model=adam does not model Adafactor; set optim to adamw_torch (or "
        "adamw_torch_fused) with optimizer_model=adam, or to sgd with optimizer_model=sgd"
    )


def test_sgd_goes_with_its_own_model(tmp_path):
    trainer = make_trainer(
        tmp_path, capo=KNOBS | {"optimizer_model": "sgd"}, optim="sgd", max_steps=1
    )
    trainer.train()
    assert trainer.capo.state_dict() == {}
    momentum = make_trainer(
        tmp_path, capo=KNOBS | {"optimizer_model": "sgd"}, optim="sgd", optim_args="momentum=0.9"
    )
    momentum.create_optimizer()
    momentum.optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError) as error:
        example.head_group(momentum)
    assert (
        str(error.value)
        == "CAPO models Adam without amsgrad and SGD without momentum; switch them off"
    )


def test_a_frozen_head_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError) as error:
        trainer.train()
    assert (
        str(error.value)
        == "CAPO models the step of the LM head, which the optimizer does not train; unfreeze it"
    )
