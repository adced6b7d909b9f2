# SPDX-License-Identifier: Apache-2.0
"""The stand-in does what ``python`` does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import warm

WHOLE = """
import os, sys
print(sys.argv, __name__, os.getcwd(), os.environ["COLOUR"], sys.stdin.read())
print(sys.path[:2], file=sys.stderr)
"""
SCRIPTS = {
    "prints": WHOLE,
    "exits": "raise SystemExit(3)",
    "says why": "raise SystemExit('no model')",
    "fails": "def deep():\n    return 1 / 0\ndeep()",
    "warns": "import warnings\nwarnings.warn('old')",
    "at exit": "import atexit\natexit.register(print, 'last')\nprint('first', end=' ')",
    "threads": "import threading, time\nthreading.Thread(target=lambda: print(7)).start()",
    "dies": "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)",
    "imports beside it": "import beside\nprint(beside.__name__)",
}


def end_of(interpreter: str, *arguments: str, cwd: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [interpreter, *arguments], cwd=cwd, input="typed", capture_output=True, text=True,
        env={**os.environ, "COLOUR": "it's=blue", "PYTHONPATH": str(cwd / "more")}, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("how", ["script", "module", "code", "unbuffered", "quiet"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_ends_as_python_does(name: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SCRIPTS[name])
    (tmp_path / "beside.py").touch()
    arguments = {
        "script": ["program.py", "a", "b c"],
        "module": ["-m", "program", "--x"],
        "code": ["-c", SCRIPTS[name], ""],
        "unbuffered": ["-u", "program.py"],
        "quiet": ["-W", "ignore", "-m", "program"],
    }[how]
    got = end_of(warm.python(), *arguments, cwd=tmp_path)
    assert got == end_of(sys.executable, *arguments, cwd=tmp_path)


@pytest.mark.parametrize("arguments", [["-V"], ["-"], ["-X", "utf8", "-c", "print(1)"]])
def test_what_it_does_not_know_is_given_to_python(arguments: list[str], tmp_path: Path) -> None:
    got = end_of(warm.python(), *arguments, cwd=tmp_path)
    assert got == end_of(sys.executable, *arguments, cwd=tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_command(number: signal.Signals) -> None:
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    process = subprocess.Popen([warm.python(), "-c", code], stdout=subprocess.PIPE, text=True)
    command = int(process.stdout.readline())
    assert command != process.pid
    process.send_signal(number)
    assert process.wait(timeout=10) == -number
    until = time.monotonic() + 10
    while Path(f"/proc/{command}").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_torch_is_there_and_verl_is_not() -> None:
    code = "import sys\nprint(*(name in sys.modules for name in ('torch', 'verl', 'capo_verl')))"
    done = subprocess.run([warm.python(), "-c", code], capture_output=True, text=True)
    assert done.stdout == "True False False\n"


def test_the_command_of_this_project() -> None:
    command = warm.environment_folder() / "bin/capo-verl"
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: capo-verl")
