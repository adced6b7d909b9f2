# SPDX-License-Identifier: Apache-2.0
"""``+capo=NAME`` on a verl command line: composition, overrides, and what is refused before
anything starts.
"""

from __future__ import annotations

import logging

import pytest
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from capo_verl.config import PRESETS, CapoConfig, TargetRejection
from capo_verl.plugin.checks.before_start import check_config

CAPO = "actor_rollout_ref.actor.policy_loss.capo"
MEGATRON = "actor_rollout_ref.actor.megatron"
FUSED = (
    "actor_rollout_ref.model.use_fused_kernels=True",
    "actor_rollout_ref.model.use_remove_padding=True",
)
FSDP = "actor_rollout_ref.actor.fsdp_config"
BASE = (
    "model_engine=megatron",
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
)


@pytest.fixture(scope="module")
def command_line():
    """Composes verl's config for the given overrides, as its ``main_ppo`` does."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield lambda *overrides: compose("ppo_trainer", overrides=list(overrides))


# The table of presets in the paper, written down a second time on purpose.
PAPER = {
    "grpo": (1e-4, 1e-2, "grpo", True, "seq-mean-token-mean"),
    "dr_grpo": (1e-3, 5e-4, "grpo", False, "seq-mean-token-sum-norm"),
    "reinforce": (1e-5, 1e-1, "reinforce", True, "seq-mean-token-mean"),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers(command_line, name):
    config = command_line("model_engine=megatron", f"+capo={name}", "data.max_response_length=77")
    actor = config.actor_rollout_ref.actor
    tau_f, tau_h, estimator, by_std, aggregation = PAPER[name]
    policy_loss = instantiate(actor.policy_loss, _convert_="partial")
    assert policy_loss.capo == CapoConfig(
        optimizer_model="adam", top_k=50, policy_shift_max=tau_f, objective_shift_max=tau_h,
        objective_shift_min="symmetric", granularity="token", mode="filter",
        sample_tokens_dir=config.trainer.default_local_dir,
    )  # fmt: skip
    assert (config.algorithm.adv_estimator, config.algorithm.norm_adv_by_std_in_grpo) == (
        estimator,
        by_std,
    )
    assert actor.loss_agg_mode == aggregation
    assert actor.loss_scale_factor == (77 if name == "dr_grpo" else None)
    assert (
        policy_loss.loss_mode == "vanilla"
    )  # the filter decides the mask, the chosen loss does the rest


def test_track_changes_nothing_else(command_line):
    plain, tracked = (
        command_line("model_engine=megatron", *more) for more in ((), ("+capo=track",))
    )
    block = tracked.actor_rollout_ref.actor.policy_loss
    assert instantiate(block, _convert_="partial").capo.mode == "track"
    OmegaConf.set_struct(tracked, False)
    del block["capo"]
    block["_target_"] = plain.actor_rollout_ref.actor.policy_loss._target_
    assert OmegaConf.to_container(plain) == OmegaConf.to_container(tracked)


def test_every_knob_can_be_overridden(command_line):
    config = command_line(
        *BASE,
        "+capo=grpo",
        f"{CAPO}.policy_shift_max=3e-4",
        f"{CAPO}.granularity=[token,sequence]",
        f"{CAPO}.top_k=null",
    )
    check_config(config)
    capo = instantiate(config.actor_rollout_ref.actor.policy_loss, _convert_="partial").capo
    assert (capo.policy_shift_max, capo.stages, capo.top_k) == (3e-4, ("token", "sequence"), None)


def test_a_threshold_that_adapts_and_soft_weights_on_the_command_line(command_line):
    config = command_line(
        *BASE,
        "+capo=soft",
        f"{CAPO}.policy_shift_max={{target_rejection: 0.02}}",
        f"{CAPO}.max_rejection=0.5",
    )
    check_config(config)
    capo = instantiate(config.actor_rollout_ref.actor.policy_loss, _convert_="partial").capo
    assert capo.policy_shift_max == TargetRejection(0.02) and capo.policy_shift_max.memory == 0.9
    assert (capo.weighting, capo.objective_shift_max, capo.max_rejection) == ("soft", None, 0.5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [f"{CAPO}.policy_shift_mx=1"],
            "capo.policy_shift_mx is not a knob of CAPO. Did you mean 'policy_shift_max'.*Valid "
            "keys: .*, mode, .*moments_dtype, on_nonfinite, .*track_every, sample_tokens_every, .*",
        ),
        ([f"{CAPO}.track_every=4"], "capo.track_every=4 needs capo.mode=track"),
        ([f"{CAPO}.weighting=soft"], "capo.weighting=soft has no m_H test, but "
        "capo.objective_shift_max=0.01"),
        ([*FUSED, f"{CAPO}.policy_penalty=2"], "capo.policy_penalty=2 needs the logits, which "
        ".*fused_kernels=True never makes"),
        (
            [f"{MEGATRON}.context_parallel_size=2", f"{CAPO}.objective_penalty=0.5"],
            "objective_penalty=0.5 needs whole sequences on a rank; with .*context_parallel_size=2 "
            "set it to 0, or that",
        ),
        (
            ["model_engine=dp", f"{FSDP}.ulysses_sequence_parallel_size=2",
                f"{CAPO}.policy_penalty=1"],
            "policy_penalty=1 needs whole sequences on a rank; with "
            ".*fsdp_config.ulysses_sequence_parallel_size=2 set it to 0",
        ),
        ([f"{CAPO}.batch_shift_every=0"], "capo.batch_shift_every=0: expected an integer >= 1"),
        ([f"{CAPO}.policy_shift_max=-1"], "capo.policy_shift_max=-1: a threshold must be >= 0"),
        ([f"{CAPO}.policy_shift_max=tiny"],
            "capo.policy_shift_max='tiny': expected a finite number"),
        ([f"{CAPO}.top_k=0"], "capo.top_k=0: expected an integer >= 1"),
        ([f"{CAPO}.betas=[0.9,0.95]"], "capo.betas is read from the actor's optimizer; set "
        "actor_rollout_ref.actor.optim"),
        (
            [*FUSED, f"{MEGATRON}.tensor_model_parallel_size=2",
                f"{MEGATRON}.sequence_parallel=False"],
            "megatron.sequence_parallel=False: with use_fused_kernels=True .* set it to True",
        ),
        (
            ["model_engine=dp", *FUSED,
                "actor_rollout_ref.model.fused_kernel_options.impl_backend=liger"],
            "impl_backend=liger: set it to torch or triton, or use_fused_kernels=False",
        ),
        (
            ["model_engine=dp", *FUSED,
                "actor_rollout_ref.model.fused_kernel_options.impl_backend=null"],
            "impl_backend=None: set it to torch or triton, or use_fused_kernels=False",
        ),
        (["model_engine=torchtitan"], "actor_rollout_ref.actor.strategy=torchtitan: set "
        "model_engine=megatron or model_engine=dp"),
        ([f"{CAPO}.moments_dtype=float16"], "capo.moments_dtype='float16': expected one of "
        "float32, bfloat16"),
        ([f"{CAPO}.on_nonfinite=ignore"], "capo.on_nonfinite='ignore': expected one of error, "
        "skip_batch"),
        (["trainer.v1.trainer_mode=separate_async"], "trainer.v1.trainer_mode=separate_async: "
        "actor_rollout_ref.rollout.nnodes=0: set it to the number"),
        (["trainer.use_v1=False"], "trainer.use_v1=False: set it to True"),
        (["actor_rollout_ref.actor.optim.optimizer=sgd"], "optimizer_model=adam models Adam, but "
        ".*optimizer=sgd"),
        (
            ["actor_rollout_ref.actor.megatron.context_parallel_size=2",
                f"{CAPO}.granularity=sequence"],
            "granularity=sequence needs whole sequences on a rank",
        ),
        (
            ["model_engine=dp", f"{FSDP}.ulysses_sequence_parallel_size=2",
                f"{CAPO}.granularity=batch"],
            "granularity=batch needs whole sequences on a rank; with actor_rollout_ref.actor."
            "fsdp_config.ulysses_sequence_parallel_size > 1 set it to token",
        ),
        (
            ["model_engine=dp", f"+{FSDP}.mixed_precision={{param_dtype: fp16}}"],
            "mixed_precision.param_dtype=fp16: its loss scaler .* set it to bf16",
        ),
        ([f"{MEGATRON}.dtype=float16"], "actor.megatron.dtype=float16: its loss scaler .* set it "
        "to bf16"),
        (
            ["trainer.total_training_steps=4", "actor_rollout_ref.actor.optim.lr_warmup_steps=5"],
            "lr_warmup_steps=5 must be less than trainer.total_training_steps=4",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_sentence(command_line, overrides, message):
    engine = [o for o in overrides if o.startswith("model_engine")] or ["model_engine=megatron"]
    rest = [o for o in overrides if not o.startswith("model_engine")]
    with pytest.raises(ValueError, match=message):
        check_config(command_line(*engine, "+capo=grpo", *rest))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model_engine=megatron", *FUSED],
        ["model_engine=megatron", *FUSED, f"{MEGATRON}.tensor_model_parallel_size=2"],
        # Padded batches are not fused, whatever the switch says.
        ["model_engine=megatron", FUSED[0], "actor_rollout_ref.model.use_remove_padding=False",
         f"{MEGATRON}.tensor_model_parallel_size=2", f"{MEGATRON}.sequence_parallel=False"],
        ["model_engine=dp", *FUSED],
        ["model_engine=dp", *FUSED,
            "actor_rollout_ref.model.fused_kernel_options.impl_backend=triton"],
    ],
)  # fmt: skip
def test_fused_kernels_are_accepted(command_line, overrides):
    check_config(command_line(*overrides, "+capo=grpo"))


def test_a_preset_contradicted_on_the_command_line_is_pointed_out(command_line, caplog):
    with caplog.at_level(logging.WARNING):
        check_config(command_line(*BASE, "+capo=reinforce"))
    assert (
        "+capo=reinforce is defined with algorithm.adv_estimator=reinforce, but the command line "
        "says grpo" in caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_config(command_line(*BASE, "+capo=grpo"))
        check_config(command_line("model_engine=megatron", "+capo=dr_grpo"))
        check_config(command_line(*BASE))
    assert not caplog.records


@pytest.mark.parametrize("engine", ["megatron", "dp"])
def test_lora_is_allowed_and_commented_on(command_line, caplog, engine):
    rank = "lora.rank" if engine == "megatron" else "lora_rank"
    with caplog.at_level(logging.WARNING):
        check_config(
            command_line(
                f"model_engine={engine}", "+capo=grpo", f"actor_rollout_ref.model.{rank}=8"
            )
        )
    assert "with LoRA the LM head is not trained" in caplog.text


def test_verl_runs_the_checks_when_it_validates_its_config(command_line, capsys):
    from verl.utils.config import validate_config

    with pytest.raises(SystemExit) as ended:
        validate_config(command_line(*BASE, "+capo=grpo", f"{CAPO}.top_k=0"), False, False)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(
        "capo_verl: refused before start: capo.top_k=0: expected an integer"
    )


def test_all_presets_are_listed():
    assert set(PRESETS) == {*PAPER, "soft", "kl_budget", "track"}
