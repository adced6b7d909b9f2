# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from capo_verl.launch.outcome import FINISHED, GIVE_UP, REQUEUE, Failure, decide, main, read_failures
from capo_verl.launch.progress import Progress

AT_4 = Progress(step=4, total_steps=10, checkpoint=3, step_seconds=60.0)
DONE = Progress(step=10, total_steps=10, checkpoint=10, step_seconds=60.0)


@pytest.mark.parametrize(
    ("exit_code", "progress", "stop", "failed_at", "action", "part"),
    [
        (0, DONE, False, (), FINISHED, "all 10 steps are done"),
        (0, DONE, True, (), FINISHED, "all 10 steps are done"),  # warned during the last step
        (0, AT_4, True, (), REQUEUE, "step 4 of 10 done"),
        (0, None, True, (), REQUEUE, "nothing done"),
        (0, AT_4, False, (), FINISHED, "without error"),
        (2, None, False, (), GIVE_UP, "refused"),
        (1, AT_4, False, (), REQUEUE, "failed at step 5 with exit code 1"),
        (1, AT_4, False, (3,), REQUEUE, "failed at step 5"),
        (1, AT_4, False, (3, 4), GIVE_UP, "failed twice at the same step (5)"),
        (3, None, False, (0,), GIVE_UP, "failed twice at the same step (1)"),
        (137, None, True, (), REQUEUE, "failed at step 1 with exit code 137"),
    ],
)
def test_decide(exit_code, progress, stop, failed_at, action, part):
    outcome, failure = decide(exit_code, progress, stop, [Failure("1.0", step, 1) for step in failed_at])
    assert outcome.action == action and part in outcome.reason
    assert (failure is not None) == (exit_code not in (0, 2))
    if failure is not None:
        assert failure.step == (progress.step if progress else 0) and failure.exit_code == exit_code


def test_command_remembers_failures(tmp_path, capsys):
    AT_4.write(tmp_path)
    history = tmp_path / "failures.jsonl"
    arguments = ["--checkpoints", str(tmp_path), "--history", str(history), "--exit-code", "1", "--attempt"]
    assert main([*arguments, "7.0"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == REQUEUE
    assert main([*arguments, "7.1"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == GIVE_UP
    assert read_failures(history) == [Failure("7.0", 4, 1), Failure("7.1", 4, 1)]


def test_progress_survives_the_disk(tmp_path):
    folder = tmp_path / "new/checkpoints"
    assert Progress.read(folder) is None
    AT_4.write(folder)
    assert Progress.read(folder) == AT_4
    assert [path.name for path in folder.iterdir()] == ["progress.json"]
    assert not AT_4.finished and DONE.finished
    assert not Progress(10, 10, 10, 1.0, stopped=True).finished
    (folder / "progress.json").write_text('{"step": 1')
    with pytest.raises(ValueError, match="progress.json is not what a run writes there"):
        Progress.read(folder)
