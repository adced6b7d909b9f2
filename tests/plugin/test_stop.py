# SPDX-License-Identifier: Apache-2.0
"""The stop request in verl's loop: the trainer is verl's own, its steps are empty."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
from omegaconf import OmegaConf

trainer_sync = pytest.importorskip("verl.trainer.ppo.v1.trainer_sync")

from capo_verl.plugin import stop
from capo_verl.plugin.stop import Progress


class Recorded:
    """What verl's loop does with a trainer, as in ``PPOTrainer.fit``, without Ray."""

    def __init__(
        self, folder, total: int, save_freq: int, first: int = 1, async_save: bool = False
    ):
        self.config = OmegaConf.create(
            {
                "trainer": {"default_local_dir": str(folder), "save_freq": save_freq},
                "actor_rollout_ref": {"actor": {"checkpoint": {"async_save": async_save}}},
            }
        )
        self.total_training_steps, self.global_steps = total, first
        self.events: list[str] = []

    def on_step_begin(self) -> None:
        self.events.append(f"begin {self.global_steps}")

    def on_step_end(self) -> None:
        self.events.append(f"sync {self.global_steps}")

    def _save_checkpoint(self) -> None:
        self.events.append(f"save {self.global_steps}")

    def fit(self, during=lambda step: None) -> None:
        while self.global_steps <= self.total_training_steps:
            is_last = self.global_steps >= self.total_training_steps
            self.timing_raw = {}
            self.on_step_begin()
            during(self.global_steps)
            every = self.config.trainer.save_freq
            if every > 0 and (is_last or self.global_steps % every == 0):
                self._save_checkpoint()
                self.timing_raw["save_checkpoint"] = 0.0
            self.on_step_end()
            self.global_steps += 1
            if is_last:
                return


@pytest.fixture(params=stop.TRAINERS)
def trainer_class(request):
    class Fresh(Recorded):
        pass

    module = ModuleType("trainer")
    setattr(module, stop.TRAINERS[request.param], Fresh)
    stop.install(module)
    return Fresh


@pytest.mark.parametrize("mode", stop.TRAINERS)
def test_verls_own_trainers_obey(mode):
    trainer = getattr(import_module(f"verl.trainer.ppo.v1.trainer_{mode}"), stop.TRAINERS[mode])
    assert trainer.on_step_end.__module__ == stop.__name__


def ask(folder, at: int):
    def during(step: int) -> None:
        if step == at:
            folder.mkdir(exist_ok=True)
            (folder / stop.REQUEST).touch()

    return during


def test_stops_after_the_step_with_a_checkpoint_before_the_weights_are_sent(
    trainer_class, tmp_path
):
    folder = tmp_path / "checkpoints"
    run = trainer_class(folder, total=10, save_freq=3)
    run.fit(ask(folder, at=2))
    assert run.events == ["begin 1", "sync 1", "begin 2", "save 2", "sync 2"]
    assert run.timing_raw["save_checkpoint"] >= 0
    progress = Progress.read(folder)
    assert (progress.step, progress.total_steps, progress.checkpoint, progress.stopped) == (
        2,
        10,
        2,
        True,
    )
    assert not progress.finished
    assert [path.name for path in folder.iterdir()] == ["progress.json"]


def test_a_step_that_is_saved_anyway_is_saved_once(trainer_class, tmp_path):
    run = trainer_class(tmp_path, total=10, save_freq=3)
    run.fit(ask(tmp_path, at=3))
    assert run.events[-3:] == ["begin 3", "save 3", "sync 3"]
    assert Progress.read(tmp_path).checkpoint == 3


def test_a_request_during_the_last_step_changes_nothing(trainer_class, tmp_path):
    run = trainer_class(tmp_path, total=2, save_freq=-1)
    run.fit(ask(tmp_path, at=2))
    assert run.events == ["begin 1", "sync 1", "begin 2", "sync 2"]
    progress = Progress.read(tmp_path)
    assert progress.finished and progress.checkpoint is None
    assert not (
        tmp_path / stop.REQUEST
    ).exists()  # nor does it stop a longer run that resumes from here


def test_without_a_request_progress_is_all_that_is_written(trainer_class, tmp_path):
    run = trainer_class(tmp_path, total=4, save_freq=2, first=3)  # resumed
    run.fit()
    assert run.events == ["begin 3", "sync 3", "begin 4", "save 4", "sync 4"]
    assert [path.name for path in tmp_path.iterdir()] == ["progress.json"]
    assert Progress.read(tmp_path).step == 4


def test_asynchronous_checkpoints_are_not_begun_when_the_process_is_about_to_end(
    trainer_class, tmp_path, caplog
):
    run = trainer_class(tmp_path, total=4, save_freq=-1, async_save=True)
    run.fit(ask(tmp_path, at=1))
    assert run.events == ["begin 1", "sync 1"]
    assert "the newest complete checkpoint counts" in caplog.text


def test_verls_trainer_has_what_the_hook_relies_on():
    import inspect

    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    loop = inspect.getsource(PPOTrainer.fit)
    assert (
        loop.index("self.on_step_begin()")
        < loop.index("self._save_checkpoint()")
        < loop.index("self.on_step_end()")
    )
    assert 'marked_timer("save_checkpoint", self.timing_raw' in loop
    assert "self.global_steps <= self.total_training_steps" in loop
    assert (
        trainer_sync.PPOTrainerSync.on_step_end.__module__ == "capo_verl.plugin.stop"
    )  # the plugin has installed it
