# SPDX-License-Identifier: Apache-2.0
"""The command around the sub-commands, and the notices of what has become one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from capo_verl.commands import data
from capo_verl.commands.main import COMMANDS, main, make_parser
from capo_verl.plugin.missing_packages import EXTRAS

SCRIPTS = Path(__file__).parents[2] / "scripts"
MOVED = {
    "plan": "capo-verl plan",
    "prepare_data": "capo-verl data",
    "evaluate": "capo-verl evaluate",
    "study": "python -m capo_verl.experiments.study",
    "benchmark_filter": "python -m capo_verl.experiments.benchmark",
    "calibration_study": "python -m capo_verl.experiments.calibration",
}


@pytest.mark.parametrize("name", MOVED)
def test_a_script_that_moved_says_where_to(name):
    script = SCRIPTS / f"{name}.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"scripts/{name}.py is now: {MOVED[name]}\n"


def test_every_command_names_an_extra():
    assert set(COMMANDS.values()) <= set(EXTRAS)
    minimal = {"calibrate": ["--model", "m", "--data", "d"], "evaluate": ["--data", "d"]}
    needed = {"evaluate": ["--output", "o"], "plot": ["run"], "report": ["run"]}
    for name in ("doctor", "quickstart", "data", "plan", "evaluate", "calibrate", "plot", "report"):
        words = [name, *minimal.get(name, []), *needed.get(name, [])]
        assert sys.modules[make_parser().parse_args(words).run.__module__] in COMMANDS


def test_names_may_come_before_and_after_an_option(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "run", lambda args: seen.append(args.names) or 0)
    assert main(["data", "math", "--overwrite", "math500", "--seed", "1", "aime24"]) == 0
    assert seen == [["math", "math500", "aime24"]]


@pytest.mark.parametrize(
    "words", [["data", "math", "--none"], ["plot", "run", "--x", "steps", "b"]]
)
def test_what_no_command_takes_is_refused(words, capsys):
    with pytest.raises(SystemExit) as refused:
        main(words)
    assert refused.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(("problem", "line"), [
    ("a\nb\tc", "a b c"), ("a\x1b[31mred", "a\\x1b[31mred"), ("é\ud800\u202e", "é\\ud800\\u202e"),
])  # fmt: skip
def test_a_refusal_is_one_line_that_a_terminal_can_show(problem, line, capsys):
    from capo_verl.commands.refusal import refuse

    assert refuse("plan", ValueError(problem)) == 2
    assert capsys.readouterr().err == f"capo-verl plan: {line}\n"
