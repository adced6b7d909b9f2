# SPDX-License-Identifier: Apache-2.0
"""What is printed, exit codes, and that standard output belongs to the report."""

from __future__ import annotations

import json
import os

import pytest

from capo_verl.commands.doctor import checks as checks_of_the_doctor
from capo_verl.commands.doctor.check import OK, SKIPPED, WARN, Broken, Check, Outcome, perform
from capo_verl.commands.main import main


def found(status, message):
    return lambda: Outcome(status, message)


def broken():
    raise Broken("it is broken: repair it")


def unexpected():
    print("printed by a check")
    os.write(1, b"written by a library\n")
    raise KeyError("no\n  such key")


CHECKS = {
    "fine": found(OK, "all is well"),
    "odd": found(WARN, "nobody has tested this: try it"),
    "absent": found(SKIPPED, "no GPU here"),
    "broken": broken,
    "unexpected": unexpected,
}


@pytest.fixture
def checks(monkeypatch):
    """Replaces the doctor's checks by some of ``CHECKS``."""

    def choose(*names):
        made = [Check(name, CHECKS[name], "do that") for name in names]
        monkeypatch.setattr(checks_of_the_doctor, "_checks", lambda *_: made)

    return choose


def test_people_and_programs_are_told_the_same(checks, capfd):
    checks(*CHECKS)
    assert main(["doctor"]) == 1
    printed, errors = capfd.readouterr()
    assert printed.splitlines()[1:8] == [  # what is missing of a stack may follow
        "ok      fine                  all is well",
        "warn    odd                   nobody has tested this: try it",
        "skipped absent                no GPU here",
        "FAIL    broken                it is broken: repair it",
        "FAIL    unexpected            KeyError: 'no\\n such key'; do that",
        "",
        "2 of 5 checks failed (1 warn, 1 skipped)",
    ]
    assert "printed by a check" in errors and "written by a library" in errors

    assert main(["doctor", "--json"]) == 1
    told = json.loads(capfd.readouterr().out)
    assert set(told) == {"status", "platform", "checks", "versions", "stacks"}
    assert told["status"] == "FAIL" and told["platform"] == "cpu"
    rows = [f"{row['status']:<8}{row['name']:<22}{row['message']}" for row in told["checks"]]
    assert rows == printed.splitlines()[1:6]
    assert all(row["seconds"] >= 0 for row in told["checks"])
    import verl

    assert told["versions"]["verl"] == verl.__version__
    assert [stack["stack"] for stack in told["stacks"]] == ["cpu", "gpu"]


@pytest.mark.parametrize(
    ("names", "status", "code"),
    [
        (["fine"], "ok", 0), (["fine", "absent"], "ok", 0), (["fine", "odd", "absent"], "warn", 0),
        (["odd", "broken", "fine"], "FAIL", 1),
    ],
)  # fmt: skip
def test_exit_codes(checks, capsys, names, status, code):
    checks(*names)
    assert main(["doctor", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["status"] == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trainer.nnodes=2"],
            "'trainer.nnodes=2' is an override for an example: name its launcher with --example",
        ),
        (
            ["--example", "examples/run_nothing.sh"],
            "--example examples/run_nothing.sh does not exist: name a launcher such as "
            "examples/run_quickstart_cpu.sh",
        ),
        (["--example", __file__, "grpo"], "'grpo' is not a Hydra override: write key=value"),
    ],
)
def test_wrong_usage(checks, capsys, arguments, message):
    checks("fine")
    assert main(["doctor", "--json", *arguments]) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors == f"capo-verl doctor: {message}\n"


@pytest.mark.parametrize(
    "arguments", [["--no-such-option"], ["--no-ray", "--ray-address", "host:1"], ["--example"]]
)
def test_what_argparse_refuses(capsys, arguments):
    with pytest.raises(SystemExit) as refused:
        main(["doctor", *arguments])
    assert refused.value.code == 2 and capsys.readouterr().err.startswith("usage: ")


def test_help_documents_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as done:
        main(["doctor", "--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert (
        "exit codes:\n  0  nothing is broken" in printed and "\n  1  something is broken" in printed
    )
    assert "\n  2  wrong usage\n" in printed


def test_a_check_that_interrupts_leaves_standard_output_in_place(capfd):
    def look():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(Check("stopped", look, ""))
    os.write(1, b"back\n")
    print("again")
    assert capfd.readouterr().out == "back\nagain\n"
