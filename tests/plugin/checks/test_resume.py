# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf

from capo_verl.plugin.checks.resume import check_resume, complete_steps, repair_tracker
from capo_verl.utils import TRACKER


def checkpoint(folder, step: int, complete: bool = True) -> None:
    (folder / f"global_step_{step}/actor").mkdir(parents=True)
    data = folder / f"global_step_{step}/data.pt"
    torch.save({"position": step}, data)
    if not complete:
        data.write_bytes(data.read_bytes()[:-30])


@pytest.fixture
def folder(tmp_path):
    checkpoint(tmp_path, 3)
    checkpoint(tmp_path, 12)
    checkpoint(tmp_path, 20, complete=False)
    (tmp_path / "global_step_25/actor").mkdir(parents=True)  # killed before data.pt
    return tmp_path


def test_complete_steps(folder):
    assert complete_steps(folder) == [3, 12]


@pytest.mark.parametrize("text", ["", "99", "1x", "\n"])
def test_an_unusable_tracker_names_the_newest_complete_checkpoint_again(folder, text, caplog):
    (folder / TRACKER).write_text(text)
    assert repair_tracker(folder) == 12
    assert (folder / TRACKER).read_text() == "12"
    assert "step 12" in caplog.text


def test_a_good_tracker_is_left_alone(folder, caplog):
    (folder / TRACKER).write_text("3")
    assert repair_tracker(folder) == 3
    assert (folder / TRACKER).read_text() == "3" and not caplog.records


def test_nothing_to_resume_from(tmp_path):
    assert repair_tracker(tmp_path) is None
    (tmp_path / TRACKER).write_text("")
    with pytest.raises(ValueError, match="holds '', and no complete checkpoint is beside it"):
        repair_tracker(tmp_path)


def test_only_runs_that_resume_by_themselves_are_looked_at(tmp_path):
    (tmp_path / TRACKER).write_text("")
    settings = {"default_local_dir": str(tmp_path), "resume_mode": "disable"}
    check_resume(OmegaConf.create({"trainer": settings}))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        check_resume(OmegaConf.create({"trainer": {**settings, "resume_mode": "auto"}}))
