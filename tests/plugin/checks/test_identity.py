# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are continued by the run that wrote them, and by no other."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from capo_verl.launch.dry_run import compose, dry_run
from capo_verl.plugin.checks.identity import (
    FILE,
    SCHEDULE,
    check_identity,
    identity,
    record_identity,
)
from capo_verl.plugin.state import REFUSED
from capo_verl.utils import TRACKER
from tests.launch.launchers import command_line
from tests.plugin.checks.verl_rows import write_splits

OPTIM = "actor_rollout_ref.actor.optim"
RESTART = f"{OPTIM}.use_checkpoint_opt_param_scheduler"
LOSS = "actor_rollout_ref.actor.policy_loss.loss_mode"
COSINE = (
    f"{OPTIM}.lr=3e-6", f"{OPTIM}.lr_decay_style=cosine", f"{OPTIM}.lr_warmup_steps_ratio=0.1",
    f"{RESTART}=True", "trainer.total_training_steps=52",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, tiny_model):
    """verl's configuration of a run that resumes by itself, with overrides."""

    def make(*overrides, engine="megatron"):
        return compose([
            f"model_engine={engine}", f"actor_rollout_ref.model.path='{tiny_model}'",
            "trainer.save_freq=1",
            "trainer.resume_mode=auto", f"trainer.default_local_dir='{tmp_path}/run'", *overrides,
        ])  # fmt: skip

    return make


@pytest.fixture
def written(run, tmp_path):
    """Let a run write a checkpoint."""

    def write(*overrides, **more):
        record_identity(run(*overrides, **more))
        (tmp_path / "run" / TRACKER).write_text("50")

    return write


def test_what_is_remembered(run, tmp_path, tiny_model):
    record_identity(
        run(*COSINE, "+capo=grpo", "data.train_batch_size=144", "actor_rollout_ref.rollout.n=8")
    )
    remembered = json.loads((tmp_path / "run" / FILE).read_text())
    assert {key: value for key, value in remembered.items() if value is not None} == {
        "actor_rollout_ref.model.path": str(tiny_model), "capo": "grpo", LOSS: "vanilla",
        f"{OPTIM}.lr": 3e-6,
        f"{OPTIM}.min_lr": 0.0, f"{OPTIM}.lr_decay_style": "cosine", f"{OPTIM}.lr_warmup_steps": -1,
        f"{OPTIM}.lr_warmup_steps_ratio": 0.1, f"{OPTIM}.weight_decay": 0.01,
        "trainer.total_training_steps": 52,
        "data.train_batch_size": 144, "actor_rollout_ref.rollout.n": 8,
    }  # fmt: skip
    assert identity(run())["capo"] == "off"


def test_knobs_that_differ_from_the_preset_tell_runs_apart(run, written):
    block = "actor_rollout_ref.actor.policy_loss.capo"
    written("+capo=grpo", f"{block}.sample_tokens_every=5")
    check_identity(run("+capo=grpo", f"{block}.batch_shift_every=1"))  # reports more, trains alike
    with pytest.raises(
        ValueError, match="capo was grpo, is grpo, top_k=20, mode=track: set another OUTPUT_DIR"
    ):
        check_identity(run("+capo=grpo", f"{block}.mode=track", f"{block}.top_k=20"))
    assert identity(run("trainer.total_epochs=7"))["trainer.total_epochs"] == 7
    for key in SCHEDULE:  # all are keys of one of verl's engines
        assert key in {f"{OPTIM}.{k}" for engine in ("megatron", "dp") for k in
                       OmegaConf.select(run(engine=engine), OPTIM)}  # fmt: skip


def test_a_record_of_a_release_with_more_knobs_is_of_the_same_run(run, written, tmp_path):
    budget = "actor_rollout_ref.actor.policy_loss.capo.kl_budget.delta"
    overrides = ("+capo=kl_budget", f"{budget}=2e-4")
    written(*overrides)
    record = tmp_path / "run" / FILE
    now = "'estimator': 'exact', 'line_search': None"
    then = (
        "'estimator': 'exact', 'reuse_next_forward': True, 'predictor': 'none', 'line_search': None"
    )
    text = record.read_text()
    assert now in text
    record.write_text(text.replace(now, then))
    check_identity(run(*overrides))
    with pytest.raises(ValueError, match="holds checkpoints of another run: capo was"):
        check_identity(run("+capo=kl_budget", f"{budget}=1e-4"))


def test_only_a_run_that_writes_checkpoints_is_remembered(run, tmp_path, monkeypatch):
    record_identity(run("trainer.save_freq=-1"))
    record_identity(run("trainer.default_local_dir='hdfs://somewhere'"))
    monkeypatch.setenv("CAPO_PREFLIGHT", "0")
    record_identity(run())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (["+capo=grpo"], [], "holds checkpoints of another run: capo was grpo, is off: set another "
        "OUTPUT_DIR"),
        ([], ["+capo=grpo"], "capo was off, is grpo"),
        (["+capo=grpo"], ["+capo=track"], "capo was grpo, is track"),
        ([], [f"{LOSS}=gspo"], f"{LOSS} was vanilla, is gspo"),
        ([], ["actor_rollout_ref.model.path=other/model"], "is other/model: set another OUTPUT_DIR "
        ".or delete .*run.json"),
        (COSINE, [*COSINE, f"{OPTIM}.lr=1.5e-5"], f"{OPTIM}.lr was 3e-06 .* is 1.5e-05, and would "
        "have no effect"),
        (COSINE, [*COSINE, "trainer.total_training_steps=100"],
         f"steps was 52 .* is 100, .* set another OUTPUT_DIR, or {RESTART}=False to start the "
         "schedule anew"),
        (COSINE, [*COSINE, f"{OPTIM}.lr_decay_style=constant"], "lr_decay_style was cosine .* is "
        "constant"),
        (COSINE[:-1], [*COSINE[:-1], "trainer.total_epochs=3"], "trainer.total_epochs was 30 .* is "
        "3"),
        ([f"{RESTART}=True"], [f"{RESTART}=True", f"{OPTIM}.lr_warmup_steps=5"], "lr_warmup_steps "
        "was -1 .* is 5"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(run, written, then, now, message):
    written(*then)
    with pytest.raises(ValueError, match=message) as refused:
        check_identity(run(*now))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (COSINE, COSINE),
        (COSINE, [*COSINE, f"{OPTIM}.lr=1e-5", f"{RESTART}=False"]),
        (COSINE, [*COSINE, "trainer.total_training_steps=100", f"{RESTART}=False"]),
        # Longer, at a constant rate, or with a decay whose length is given.
        ([f"{RESTART}=True", "trainer.total_training_steps=4"],
            [f"{RESTART}=True", "trainer.total_training_steps=6"]),
        ([*COSINE, f"{OPTIM}.lr_decay_steps=52"],
         [*COSINE, f"{OPTIM}.lr_decay_steps=52", "trainer.total_training_steps=60"]),
        (["+capo=grpo"], ["trainer.resume_mode=disable"]),
    ],
    ids=str,
)  # fmt: skip
def test_accepted(run, written, then, now, caplog):
    written(*then)
    check_identity(run(*now))
    assert not caplog.records


def test_fsdp_takes_the_rate_from_the_checkpoint_and_the_schedule_from_the_configuration(
    run, written
):
    written("trainer.total_training_steps=4", engine="dp")
    check_identity(run("trainer.total_training_steps=6", f"{OPTIM}.lr_warmup_steps=2", engine="dp"))
    with pytest.raises(ValueError, match="lr was 1e-06 .* is 1e-05, .* set another OUTPUT_DIR$"):
        check_identity(run("trainer.total_training_steps=4", f"{OPTIM}.lr=1e-5", engine="dp"))


def test_fsdp_scheduler():
    """What the rule above rests on: torch's scheduler, as transformers makes it for verl."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    def made(rate, steps):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
        return get_cosine_schedule_with_warmup(optimizer, 0, steps)

    first, second = made(1.0, 4), made(5.0, 8)
    for _ in range(4):
        first.optimizer.step()
        first.step()
    second.load_state_dict(first.state_dict())
    second.optimizer.step()
    second.step()
    assert second.get_last_lr() == pytest.approx(
        [0.5 * (1 + torch.cos(torch.tensor(5 / 8 * torch.pi)).item())]
    )


@pytest.mark.parametrize("restored", [True, False])
def test_megatron_scheduler(run, restored):
    """With the setting a longer run goes on at the cosine's end; without it verl does not load the
    scheduler at all.
    """
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.megatron.optimizer import get_megatron_optimizer_param_scheduler

    def made(steps, rate):
        config = run(
            *COSINE, f"{OPTIM}.lr={rate}", f"{RESTART}={restored}"
        ).actor_rollout_ref.actor.optim
        config.total_training_steps = steps
        optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
        return get_megatron_optimizer_param_scheduler(optimizer, omega_conf_to_dataclass(config))

    first, second = made(52, 3e-6), made(100, 1e-5)
    first.step(52)
    if restored:
        second.load_state_dict(first.state_dict())
    second.step(10)
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(
        0.0 if restored else 1e-5, abs=1e-12
    )


def test_another_batch_is_a_warning(run, written, caplog):
    written("data.train_batch_size=144")
    check_identity(run("data.train_batch_size=12"))
    assert "data.train_batch_size was 144" in caplog.text and "is 12" in caplog.text


def test_nothing_is_compared_without_a_checkpoint_or_a_record(run, written, tmp_path):
    record_identity(run("+capo=grpo"))
    check_identity(run())  # no checkpoint yet
    written("+capo=grpo")
    (tmp_path / "run" / FILE).unlink()  # one of before
    check_identity(run())
    for text in ("{", "[]"):
        (tmp_path / "run" / FILE).write_text(text)
        with pytest.raises(
            ValueError, match="run.json is not what a run writes there.*: delete it"
        ):
            check_identity(run())


def test_verls_validation_compares_and_remembers_and_a_dry_run_only_compares(
    tmp_path, tiny_model, monkeypatch, capsys
):
    from verl.utils.config import validate_config

    write_splits(tmp_path / "data")

    def overrides(capo):
        return command_line(
            "run_quickstart_cpu.sh", tmp_path, MODEL_PATH=tiny_model, SAVE_FREQ=1, CAPO=capo
        )[1:]

    file, tracker = tmp_path / "run/checkpoints" / FILE, tmp_path / "run/checkpoints" / TRACKER
    monkeypatch.setenv("DRY_RUN", "strict")
    dry_run(overrides("grpo"))
    assert not file.exists()
    validate_config(compose(overrides("off")), False, False)
    validate_config(compose(overrides("grpo")), False, False)  # nothing was written yet
    assert json.loads(file.read_text())["capo"] == "grpo"
    (tracker.parent / "global_step_1").mkdir()
    tracker.write_text("1")
    with pytest.raises(ValueError, match="capo was grpo, is off"):
        dry_run(overrides("off"))
    with pytest.raises(SystemExit) as end:
        validate_config(compose(overrides("off")), False, False)
    assert end.value.code == REFUSED
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("capo_verl: refused before start: ") and "capo was grpo, is off" in last
    assert json.loads(file.read_text())["capo"] == "grpo"
