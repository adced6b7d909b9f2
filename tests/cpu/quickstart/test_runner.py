# SPDX-License-Identifier: Apache-2.0
"""The runner with a stand-in for the launcher: success, failure, Ctrl-C, and nothing left
running.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

pytest.importorskip("matplotlib")
pytest.importorskip("reasoning_gym")

from capo_verl.commands import quickstart as cli
from capo_verl.cpu.quickstart import launcher_process, log, runner
from capo_verl.cpu.quickstart.display import Display
from tests.cpu.quickstart.recorded import GRPO, write_capo

CONFIG = """\
data: {train_batch_size: 16}
actor_rollout_ref: {rollout: {n: 8}}
trainer: {total_training_steps: 6}
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Run the quickstart with a bash script in place of the launcher; returns (exit code, output,
    folder).
    """
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(
        runner, "prepare", lambda display: runner.Prepared(tmp_path / "data", tmp_path / "model")
    )

    def run(
        script: str, algorithm: str = "CAPO", overrides: tuple[str, ...] = ()
    ) -> tuple[int, str, Path]:
        launcher = tmp_path / "launcher.sh"
        launcher.write_text(textwrap.dedent(script))
        monkeypatch.setattr(runner, "LAUNCHER", launcher)
        out = io.StringIO()
        folder = tmp_path / "out"
        code = runner.run(algorithm, list(overrides), folder, Display(Console(file=out)))
        return code, out.getvalue(), folder

    return run


def writes(metrics: Path, config: str = CONFIG) -> str:
    return (
        f'mkdir -p "$OUTPUT_DIR/hydra/.hydra"; printf "%s" "{config}" '
        '>"$OUTPUT_DIR/hydra/.hydra/config.yaml"\n'
        f'head -n 2 "{metrics}" >"$VERL_FILE_LOGGER_PATH"; sleep 0.3; cp "{metrics}" '
        '"$VERL_FILE_LOGGER_PATH"\n'
    )


def test_successful_run(launch, tmp_path):
    code, text, folder = launch(writes(write_capo(tmp_path / "capo.jsonl")))
    assert code == 0
    rows = [line.split() for line in text.splitlines() if "/6 " in line]
    assert [row[0] for row in rows] == [f"{step}/6" for step in range(7)]
    assert [row[1] for row in rows] == [f"{128 * step:,}" for step in range(7)]
    assert rows[2][4] == "1.25%"
    assert "0.355 -> 0.418" in text
    assert (folder / "curves.png").exists()


def test_a_second_run_in_the_same_folder_keeps_the_first_ones_metrics(launch):
    def metrics(text: str) -> str:
        return next(line for line in text.splitlines() if line.startswith("Metrics: "))

    _, first, folder = launch(writes(GRPO), "GRPO")
    _, second, _ = launch(writes(GRPO), "GRPO")
    assert metrics(first) == f"Metrics: {folder}/metrics.jsonl"
    assert metrics(second) == f"Metrics: {folder}/metrics.2.jsonl"
    assert (
        (folder / "metrics.jsonl").read_text()
        == (folder / "metrics.2.jsonl").read_text()
        == GRPO.read_text()
    )


def test_grpo_is_the_launcher_without_the_switch(launch):
    echo = 'echo "$@"\n' + writes(GRPO)
    _, _, folder = launch(echo, "GRPO", ("data.seed=3",))
    assert (folder / "train.log").read_text() == "data.seed=3\n"
    _, _, folder = launch(echo, "CAPO", ("data.seed=3",))
    first, *_, last = (folder / "train.log").read_text().split()
    assert (first, last) == ("+capo=grpo", "data.seed=3")


def test_failure_shows_the_first_traceback_and_keeps_the_exit_code(launch):
    code, text, folder = launch(
        """
        echo 'some chatter'
        echo -e '\\033[36m(AgentLoopWorkerTQ pid=12)\\033[0m what failed first'
        echo -e '\\033[36m(AgentLoopWorkerTQ pid=12)\\033[0m Traceback (most recent call last):'
        echo -e '\\033[36m(AgentLoopWorkerTQ pid=12)\\033[0m   File "rollout.py", line 3, in f'
        echo '(WorkerDict pid=13) chatter of another process'
        echo -e '\\033[36m(AgentLoopWorkerTQ pid=12)\\033[0m     raise RuntimeError("no weights")'
        echo -e '\\033[36m(AgentLoopWorkerTQ pid=12)\\033[0m RuntimeError: no weights'
        echo 'Traceback (most recent call last):'
        echo '  File "main.py", line 1, in <module>'
        echo 'ValueError: Received an empty list as keys.'
        exit 7
        """
    )
    assert code == 7
    assert "failed with exit code 7" in text
    assert "RuntimeError: no weights" in text and "what failed first" in text
    assert "empty list as keys" not in text and "another process" not in text
    assert str(folder / "train.log") in text
    assert "failed: Start" in text


def test_failure_without_traceback_shows_the_last_lines(launch):
    code, text, _ = launch(
        "for i in $(seq 1 30); do echo line $i; done; echo \"Key 'trainr' is not in struct\"; exit "
        "1"
    )
    assert code == 1
    assert "Key 'trainr' is not in struct" in text
    assert "line 30" in text and "line 3\n" not in text


def test_failure_during_training(launch):
    code, text, _ = launch(
        writes(GRPO) + "echo 'Traceback (most recent call last):'; echo 'OSError: full'; exit 3"
    )
    assert code == 3
    assert "OSError: full" in text and "failed: RL" in text
    assert "Held-out accuracy" not in text


def test_killed_child_is_a_failure(launch):
    assert launch("kill -9 $$")[0] == 137


@pytest.fixture
def stubborn_run(tmp_path):
    """A runner in a process of its own, and a grandchild of it that ignores SIGTERM and survives
    its parent.
    """
    launcher = tmp_path / "launcher.sh"
    launcher.write_text(
        f"(trap '' TERM; echo $BASHPID >{tmp_path}/pid; while true; do sleep 0.2; done) &\nexec "
        "sleep 600\n"
    )
    script = textwrap.dedent(f"""
        import signal
        from pathlib import Path
        from capo_verl.cpu.quickstart import launcher_process, runner
        from capo_verl.cpu.quickstart.display import Display
        # as the command does; ignored in background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
        launcher_process.PATIENCE = 2.0
        runner.LAUNCHER = Path({str(launcher)!r})
        runner.prepare = lambda display: runner.Prepared(Path("d"), Path("m"))
        raise SystemExit(runner.run("GRPO", [], Path({str(tmp_path / "out")!r}), Display()))
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    grandchild = int((tmp_path / "pid").read_text())
    assert psutil.pid_exists(grandchild)
    time.sleep(0.5)
    yield process, grandchild
    process.kill()


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_ctrl_c_stops_the_whole_session(stubborn_run):
    process, grandchild = stubborn_run
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped" in output
    assert not is_alive(grandchild)


def test_a_killed_runner_takes_its_session_along(stubborn_run):
    process, grandchild = stubborn_run
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while is_alive(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_leftovers_of_a_finished_child_are_stopped(tmp_path):
    command = ["bash", "-c", f"sleep 600 & echo $! >{tmp_path}/pid"]
    with launcher_process.LauncherProcess(command, dict(os.environ), tmp_path / "log") as running:
        assert running.wait() == 0
    pid = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_of_a_chain_of_ray_calls_the_innermost_is_shown():
    text = """\
Traceback (most recent call last):
  File "main_ppo.py", line 184, in main
    raise value.as_instanceof_cause()
ray.exceptions.RayTaskError(RuntimeError): \x1b[36mray::TaskRunnerV1.run()\x1b[39m (pid=1, ip=10.0.0.1)
  File "trainer_base.py", line 477, in fit
           ^^^^^^^^
ray.exceptions.RayTaskError(RuntimeError): \x1b[36mray::WorkerDict.update_actor()\x1b[39m (pid=2, ip=10.0.0.1)
  File "losses.py", line 104, in ppo_loss
RuntimeError: sizes differ

Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace.
"""  # noqa: E501
    first, *_, last = log.failure_report(text)
    assert "WorkerDict.update_actor()" in first
    assert last == "RuntimeError: sizes differ"
    assert len(log.failure_report(text)) == 3


def test_long_lines_are_cut():
    *_, last = log.failure_report("Error executing job with overrides: [" + "x" * 5000)
    assert len(last) == log.MAX_WIDTH and last.endswith(" ...")


def test_startup_milestones():
    fractions = [
        log.startup_fraction("\n".join(marker for marker, *_ in log.MILESTONES[:n]))[0]
        for n in range(8)
    ]
    assert fractions == sorted(set(fractions)) and fractions[0] > 0 and fractions[-1] < 1


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    return parser.parse_args(["quickstart", *argv])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), ("CAPO", [])),
        (("grpo",), ("GRPO", [])),
        (("GRPO", "a.b=1", "+c=2", "~d"), ("GRPO", ["a.b=1", "+c=2", "~d"])),
        (("a.b=1", "c=2"), ("CAPO", ["a.b=1", "c=2"])),
    ],
)
def test_command_line(monkeypatch, argv, expected):
    calls = []
    monkeypatch.setattr(
        runner, "run", lambda algorithm, overrides, *_: calls.append((algorithm, overrides)) or 5
    )
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    args = parse(*argv)
    assert args.run(args) == 5
    assert calls == [expected]


@pytest.mark.parametrize(
    ("argv", "hint"), [(("PPO",), "use one of GRPO, CAPO"), (("GRPO", "lr"), "write key=value")]
)
def test_wrong_command_line_is_one_sentence(monkeypatch, capsys, argv, hint):
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("started"))
    args = parse(*argv)
    assert args.run(args) == 2
    assert hint in capsys.readouterr().err
