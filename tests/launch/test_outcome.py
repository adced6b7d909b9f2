# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from capo_verl.launch.outcome import (
    FINISHED,
    GIVE_UP,
    REQUEUE,
    Attempt,
    decide,
    main,
    read_attempts,
)
from capo_verl.plugin.stop import Progress

AT_4 = Progress(step=4, total_steps=10, checkpoint=3, step_seconds=60.0)
STOPPED = Progress(step=4, total_steps=10, checkpoint=4, step_seconds=60.0, stopped=True)
DONE = Progress(step=10, total_steps=10, checkpoint=10, step_seconds=60.0)


def attempt(exit_code=1, stop=False, trained=True, step=4, checkpoint=3) -> Attempt:
    return Attempt("7.0", exit_code, stop, trained, step, checkpoint)


def failed_at(step: int, trained: bool = True) -> Attempt:
    return attempt(step=step, trained=trained)


@pytest.mark.parametrize(
    ("this", "progress", "earlier", "action", "part"),
    [
        (attempt(0, step=10), DONE, [], FINISHED, "all 10 steps are done"),
        (
            attempt(0, stop=True, step=10),
            DONE,
            [],
            FINISHED,
            "all 10 steps are done",
        ),  # warned during the last step
        (attempt(0), AT_4, [], FINISHED, "without error"),
        (
            attempt(0, trained=False, step=10),
            None,
            [],
            FINISHED,
            "without error",
        ),  # was complete before
        (attempt(0, stop=True), STOPPED, [], REQUEUE, "stopped as requested, step 4 of 10 done"),
        # Warned while the nodes joined: what an earlier attempt wrote does not count.
        (
            attempt(0, stop=True, trained=False, step=3),
            None,
            [],
            REQUEUE,
            "stopped as requested, step 3 done",
        ),
        (attempt(2, trained=False), None, [], GIVE_UP, "refused"),
        (attempt(), AT_4, [], REQUEUE, "failed at step 5 with exit code 1"),
        (attempt(), AT_4, [failed_at(3)], REQUEUE, "failed at step 5"),
        (
            attempt(),
            AT_4,
            [failed_at(3), failed_at(4)],
            GIVE_UP,
            "failed twice at the same step (5)",
        ),
        # An attempt that did not get as far as a step failed elsewhere.
        (
            attempt(3, trained=False),
            None,
            [failed_at(4)],
            REQUEUE,
            "failed before its first step with exit code 3",
        ),
        (
            attempt(3, trained=False),
            None,
            [failed_at(4, False)],
            GIVE_UP,
            "failed twice before its first step",
        ),
        # Preempted: killed after a warning is no failure of the run.
        (attempt(143, stop=True), AT_4, [failed_at(4)], REQUEUE, "after it was asked to stop"),
        (attempt(), AT_4, [attempt(143, stop=True)], REQUEUE, "failed at step 5"),
        (
            attempt(143, stop=True),
            AT_4,
            [attempt(143, stop=True)],
            REQUEUE,
            "after it was asked to stop",
        ),
        (
            attempt(1, stop=True),
            AT_4,
            [attempt(0, stop=True)] * 2,
            GIVE_UP,
            "3 attempts in a row had to stop",
        ),
        (
            attempt(0, stop=True),
            STOPPED,
            [attempt(0, stop=True, checkpoint=2)] * 4,
            REQUEUE,
            "stopped as requested",
        ),
        (
            attempt(0, stop=True),
            STOPPED,
            [attempt(0, stop=True), failed_at(4)] * 2,
            REQUEUE,
            "stopped as requested",
        ),
    ],
)
def test_decide(this, progress, earlier, action, part):
    outcome = decide(this, progress, earlier)
    assert outcome.action == action and part in outcome.reason


def test_command(tmp_path, capsys):
    """Two failures at step 5, then one before any step; a copy of what was there before tells them
    apart.
    """
    history, before = tmp_path / "attempts.jsonl", tmp_path / "before.json"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")

    def call(name: str, exit_code: int, *more: str) -> list[str]:
        code = main(["--checkpoints", str(tmp_path), "--history", str(history), "--attempt", name,
            "--exit-code",
                     str(exit_code), "--before", str(before), "--resumed-from", "3",
                     *more])  # fmt: skip
        assert code == 0
        return capsys.readouterr().out.splitlines()

    AT_4.write(tmp_path)
    assert call("7.0", 1) == [
        REQUEUE,
        "failed at step 5 with exit code 1, for the first time there",
    ]
    before.write_text((tmp_path / "progress.json").read_text())
    assert call("7.1", 3) == [
        REQUEUE,
        "failed before its first step with exit code 3, for the first time there",
    ]
    before.unlink()
    assert call("7.2", 1) == [
        GIVE_UP,
        "failed twice at the same step (5): not requeued; see both attempts' logs",
    ]
    assert read_attempts(history) == [
        Attempt("7.0", 1, False, True, 4, 3), Attempt("7.1", 3, False, False, 3, 3),
        Attempt("7.2", 1, False, True, 4, 3)
    ]  # fmt: skip
    DONE.write(tmp_path)
    assert call("7.3", 0, "--stop-requested")[0] == FINISHED
    assert len(read_attempts(history)) == 3


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


@pytest.fixture
def finished(tmp_path, capsys):
    """Runs the command for an attempt that has finished; its exit code and its lines."""
    DONE.write(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")

    def call(exit_code: int = 0) -> list[str]:
        code = main([
            "--checkpoints", str(tmp_path), "--history", str(tmp_path / "attempts.jsonl"),
            "--attempt", "7.1",
            "--exit-code", str(exit_code), "--before", str(tmp_path / "before.json"),
            "--resumed-from", "3",
        ])  # fmt: skip
        assert code == 0
        return capsys.readouterr().out.splitlines()

    return call


DAMAGED = {
    "attempts.jsonl": [b'{"name": "7.0", "exit_', b"\xff\xfe\n", b"[]\n", b'{"a": 1}\n',
    b"[" * 5000],
    "latest_checkpointed_iteration.txt": [b"", b"ten", b"\xff", b"-3", b"9" * 5000, "٣".encode()],
    "before.json": [b"", b"{", b"[1]", b'{"step": "x"}', b"\xff",
                    b'{"step": "1", "total_steps": 2, "checkpoint": 1, "step_seconds": 1}'],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, all_ in DAMAGED.items() for content in all_],
    ids=lambda value: value if isinstance(value, str) else repr(value[:20]),
)  # fmt: skip
def test_a_damaged_file_is_named_and_a_finished_run_is_finished(finished, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    *warnings, action, reason = finished()
    assert (action, reason) == (FINISHED, "all 10 steps are done")
    assert len(warnings) == 1
    assert warnings[0].startswith(f"WARNING: {tmp_path / name}")


def test_the_attempt_after_a_cut_line_is_remembered(finished, tmp_path):
    history = tmp_path / "attempts.jsonl"
    history.write_text('{"name": "7.0", "exit_')
    assert finished(1)[-2] == REQUEUE
    assert [earlier.name for earlier in read_attempts(history)] == ["7.1"]
    assert finished(1)[-2] == GIVE_UP


def test_a_damaged_progress_counts_as_none(finished, tmp_path):
    (tmp_path / "progress.json").write_text("{")
    *warnings, action, reason = finished()
    assert (action, reason) == (FINISHED, "without error")
    assert warnings[0].startswith(f"WARNING: {tmp_path / 'progress.json'} is not what a run writes")
