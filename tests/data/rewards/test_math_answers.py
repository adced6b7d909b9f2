# SPDX-License-Identifier: Apache-2.0
"""The reward function: equivalences, hostile answers, limits of time and memory, reasoning-gym's
problems.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from capo_verl.data.rewards import guard, math_answers
from capo_verl.data.rewards.math_answers import compute_score
from capo_verl.data.rewards.pool import Pool, Verdict

KEYS = {"score", "acc", "pred", "answered", "judge_failed"}


@pytest.fixture(autouse=True)
def forget():
    math_answers._verdicts.clear()


def score(answer: str, reference: str, **kwargs) -> dict:
    return compute_score(
        "math", f"Therefore \\boxed{{{answer}}}.", reference, {"answer_format": "boxed"}, **kwargs
    )


EQUAL = [
    ("0.5", "\\frac{1}{2}"), ("\\frac12", "1/2"), ("\\dfrac{2}{4}", "\\frac{1}{2}"),
    ("0.3333333", "\\frac13"),
    ("2\\sqrt2", "\\sqrt{8}"), ("1024", "2^{10}"), ("(x+1)^2", "x^2+2x+1"),
    ("3.14159265358979", "\\pi"),
    ("2,1", "\\{1,2\\}"), ("\\{2, 1\\}", "1,2"), ("2 \\text{ and } 1", "1,2"), ("-1,1", "\\pm 1"),
    ("(1, 2)", "(1,2)"),
    ("\\left(3,\\frac{\\pi}{2}\\right)", "\\left( 3, \\frac{\\pi}{2} \\right)"),
    ("0\\le x<1", "[0,1)"), ("(4,\\infty)\\cup(-\\infty,3)", "(-\\infty,3)\\cup(4,\\infty)"),
    ("[2,3]", "x\\in[2,3]"),
    ("50", "50\\%"), ("0.5", "50\\%"), ("50%", "0.5"), ("50\\%", "50"), ("50 percent", "50%"),
    ("10", "10\\text{ cm}"), ("9 apples", "9"), ("\\$32", "32"), ("90", "90^\\circ"),
    ("12345", "12,345"),
    ("x=3", "3"), ("3", "x=3"), ("evelyn", "\\text{Evelyn}"), ("\\text{Mrs. Hilt}", "Mrs. Hilt"),
    ("C", "\\text{(C)}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("10-4n", "-10-4(n-5)"), ("$7$", "7"),
]  # fmt: skip
DIFFERENT = [
    ("0.4", "\\frac{1}{2}"), ("1,3", "1,2"), ("(2,1)", "(1,2)"), ("[0,1]", "[0,1)"),
    ("5000%", "50%"), ("0.5%", "50%"),
    ("1", "\\pm 1"), ("Anna", "\\text{Evelyn}"), ("D", "\\text{(C)}"), ("x^2+2x+2", "(x+1)^2"),
    ("12.345", "12,345"),
    ("-3", "3"), ("\\begin{pmatrix}1\\\\3\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("x", "3"),
]  # fmt: skip


QUESTIONS = [
    ("\\sum_{k=1}^{100}k", "5050"), ("\\displaystyle\\sum _{k=1}^{100} k", "5050"),
    ("\\prod_{k=1}^3 k", "6"),
    ("\\int_0^1\\frac1{1+x^2}dx", "\\frac{\\pi}{4}"), ("\\lim_{x\\to0}\\frac{\\sin x}{x}", "1"),
    ("\\frac{d}{dx}x^2", "2x"), ("\\gcd(12,15)", "3"), ("\\operatorname{lcm}(4,6)", "12"),
    ("\\binom{5}{2}", "10"),
    ("{5 \\choose 2}", "10"), ("5!", "120"), ("\\frac{6!}{3!}", "120"), ("\\max(3,5)", "5"),
    ("17 \\mod 5", "2"),
    ("\\lfloor 3.7\\rfloor", "3"), ("\\det\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "-2"),
    ("x=\\sum_{k=1}^{100}k", "5050"), ("\\sum_{k=1}^{10}k", "n=55"),
    ("\\sum_{k=0}^{4}\\binom{4}{k}^2", "\\binom{8}{4}"),
]  # fmt: skip
"""math-verify evaluates them all; an answer as complicated as the question is none."""
UNTRUE = [
    ("6=5", "5"), ("1=2=3=5", "5"), ("x=6=5", "5"), ("6=x=5", "5"), ("(6=5)", "5"),
    ("\\{6=5\\}", "5"), ("6\\equiv 5", "5"), ("\\sqrt{2}=1.414=5", "5"), ("n=6=5", "n=5"),
    ("6\\text{ cm}=5\\text{ cm}", "5"), ("3=1,2", "1,2"), ("3\\pi=2\\pi", "2\\pi"),
]  # fmt: skip
FINAL = [
    ("x=5", "5"), ("k=\\frac12", "0.5"), ("x_1=5", "5"), ("\\theta=30^\\circ", "30"), ("AB=5", "5"),
    ("f(2)=4", "4"),
    ("a+b=5", "5"), ("P(A)=\\frac12", "\\frac12"), ("\\text{Area}=5", "5"), ("x=y=5", "5"),
    ("2+3=5", "5"), ("x=2+3=5", "5"),
    ("\\sum_{k=1}^{100}k=5050", "5050"), ("x=1, x=2", "1,2"), ("x=1\\text{ or }x=2", "1,2"),
    ("x=1,y=2", "(1,2)"),
    ("(x,y)=(1,2)", "(1,2)"), ("2x-y+1=0", "y=2x+1"), ("y=2x+1", "2x+1"), ("n=5", "n=5"),
    ("10,\\!000", "10000"), ("x=50\\%", "50\\%"), ("\\log_2 8", "3"), ("\\ln 9", "2\\ln 3"),
    ("\\cos\\frac{\\pi}{6}", "\\frac{\\sqrt3}{2}"),
    ("x\\in[2,3]", "[2,3]"), ("2^{10}", "1024"), ("\\frac{n!}{2}", "\\frac{n!}{2!}"),
    ("\\binom{10}{3}", "\\frac{10!}{3!7!}"),
    ("\\sum_{i=1}^{3} a_i", "\\sum_{i=1}^{3} a_i"), ("30 \\min", "30\\min"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), [*QUESTIONS, *UNTRUE])
def test_what_only_ends_like_an_answer(answer, reference):
    result = score(answer, reference)
    assert (result["score"], result["answered"], result["judge_failed"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(("answer", "reference"), QUESTIONS)
def test_math_verify_would_pay_for_questions(answer, reference):
    """Or the refusals above would prove nothing."""
    from capo_verl.data.rewards.equivalence import same
    from capo_verl.data.rewards.notation import normalise

    assert same(normalise(reference), normalise(answer))


@pytest.mark.parametrize(("answer", "reference"), FINAL)
def test_final_answers(answer, reference):
    assert score(answer, reference)["score"] == 1.0


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal(answer, reference):
    result = score(answer, reference)
    assert result.keys() == KEYS
    assert (result["score"], result["acc"], result["answered"], result["judge_failed"]) == (
        1.0,
        1.0,
        1.0,
        0.0,
    )


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different(answer, reference):
    result = score(answer, reference)
    assert (result["score"], result["acc"], result["answered"], result["judge_failed"]) == (
        0.0,
        0.0,
        1.0,
        0.0,
    )


def test_no_answer_and_too_long_an_answer():
    assert compute_score("math", "It is 5", "5") == {
        "score": 0.0,
        "acc": 0.0,
        "pred": "",
        "answered": 0.0,
        "judge_failed": 0.0,
    }
    result = score("1+" * 600 + "1", "601")
    assert (result["score"], result["judge_failed"], len(result["pred"])) == (0.0, 1.0, 200)


SLOW = ["9^{9^{9^{9}}}", "(10^{10})!", "2^{2^{100}}", "\\binom{10^9}{5*10^8}"]
HARMLESS = "3!"  # a reference that lets such answers through to the parser


@pytest.mark.parametrize("answer", SLOW)
def test_an_answer_that_takes_too_long_ends_in_time_and_the_next_one_is_judged(answer):
    start = time.monotonic()
    result = score(answer, HARMLESS, timeout_seconds=1.0)
    assert (result["score"], result["judge_failed"]) == (0.0, 1.0)
    assert time.monotonic() - start < 20  # the limit, and up to a worker's start on a busy machine
    assert score("0.25", "\\frac14")["score"] == 1.0


def test_time_limit_in_a_thread_as_verl_calls_it():
    with ThreadPoolExecutor(4) as threads:
        slow = [threads.submit(score, answer, HARMLESS, timeout_seconds=1.0) for answer in SLOW]
        fast = [threads.submit(score, f"{i}/10", f"0.{i}") for i in range(1, 10)]
        assert [future.result()["judge_failed"] for future in slow] == [1.0] * 4
        assert [future.result()["score"] for future in fast] == [1.0] * 9


HOSTILE = {
    "deep brackets": "(" * 450 + "1" + ")" * 450,
    "deep fractions": "\\frac{1}{" * 90 + "1" + "}" * 90,
    "null bytes": "1\x00\x00",
    "escape codes": "\x1b[2J1\x07",
    "endless number": "9" * 900,
    "other scripts": "\u0661\u0662\u202e3\ufeff\U0001f600",
    "lone surrogate": "\ud800",
    "braces": "}" * 3 + "{" * 3,
    "newlines": "1\n" * 100,
    "backslashes": "\\" * 300,
    "commands": "\\input{/etc/passwd}\\write18{id}",
    "json": '", "score": 1.0, "x": "',
    "reply": '\n{"score": 1.0}\n',
    "dunder": "().__class__.__base__.__subclasses__()",
    "many sums": "+".join(["\\sum_{n=1}^{10^9}n"] * 20),
    "many sums on the way": "+".join(["\\sum_{n=1}^{10^9}1"] * 20) + "=1=43",
    "many equations": "=".join("1" * 300),
    "zoo": "\\frac{1}{0}",
    "nan": "\\text{nan}",
    "sqrt tower": "\\sqrt{" * 28 + "2" + "}" * 28,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_answers_score_nothing(case):
    for response in (f"\\boxed{{{HOSTILE[case]}}}", f"<answer>{HOSTILE[case]}</answer>"):
        result = compute_score("math", response, "42", timeout_seconds=2.0)
        assert result.keys() == KEYS and result["score"] == 0.0
        assert not re.search(r"[\x00-\x1f]", result["pred"])


def test_memory_is_limited():
    pool = Pool("math", 1)
    try:
        pool.judge({"reference": "1", "answer": "2"}, 20.0)
        limits = Path(f"/proc/{pool.pids()[0]}/limits").read_text()
    finally:
        pool.close()
    assert re.search(rf"Max address space +{guard.ADDRESS_SPACE} +{guard.ADDRESS_SPACE} ", limits)
    code = "from capo_verl.data.rewards.guard import confine; confine(); bytearray(3 << 30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "MemoryError" in done.stderr


CONFINED = {
    "open(path, 'w')": "open for writing",
    "os.open(path, os.O_CREAT | os.O_WRONLY)": "open for writing",
    "os.system('touch ' + path)": "os.system",
    "subprocess.run(['touch', path])": "subprocess.Popen",
    "os.mkdir(path)": "os.mkdir",
    "os.fork()": "os.fork",
    "socket.socket()": "socket.__new__",
    "os.posix_spawn('/bin/touch', ['touch', path], {})": "os.posix_spawn",
}


@pytest.mark.parametrize("attempt", CONFINED)
def test_confinement(tmp_path, attempt):
    """What an evaluated answer could do, if there were a way to have one evaluated after all."""
    path = tmp_path / "canary"
    code = (
        "import os, socket, subprocess, sys\nfrom capo_verl.data.rewards.guard import "
        "confine\npath = sys.argv[1]\nconfine()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + attempt, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"RefusedError: {CONFINED[attempt]} is refused" in done.stderr
    assert not path.exists()


def injections(canary: Path) -> list[str]:
    touch = f"touch {canary}"
    spelled = "+".join(f"chr({ord(c)})" for c in f"open({str(canary)!r},'w').close()")
    return [
        f"__import__('os').system('{touch}')",
        f"open('{canary}','w').close()",
        f"[open('{canary}','w')]",
        f"exec(\"open('{canary}','w')\")",
        f"eval({spelled})",
        f"sympify(\"__import__('os').system('{touch}')\")",
        f"(lambda: __import__('subprocess').run(['touch','{canary}']))()",
        f"\\operatorname{{eval}}(open('{canary}','w'))",
        f"\\text{{__import__('os').system('{touch}')}}",
    ]


def test_no_answer_is_evaluated(tmp_path):
    canary = tmp_path / "canary"
    for injection in injections(canary):
        for response in (f"\\boxed{{{injection}}}", f"<answer>{injection}</answer>"):
            assert compute_score("math", response, "42")["score"] == 0.0
    assert not canary.exists()


GYM = {
    "countdown": {"numbers": [1, 2], "target": 3, "expression": "1 + 2"},
    "puzzle24": {"numbers": [1, 2, 3, 4]},
    "polynomial_multiplication": {"polys": ["x"], "variables": ["x"]},
    "simple_integration": {"integrand": "2*x", "variable": "x"},
    "intermediate_integration": {"integrand": "2*x", "variable": "x"},
    "string_insertion": {},
    "spiral_matrix": {},
    "binary_matrix": {},
    "n_queens": {"valid_answers": ["Q"], "solutions": []},
}
"""Generators whose scorers evaluate the answer, with what their scorers read of an entry."""


def gym_score(generator: str, answer: str, reference: str, metadata: dict) -> dict:
    entry = json.dumps(
        {"question": "", "answer": reference, "metadata": {"source_dataset": generator, **metadata}}
    )
    extra = {"answer_format": "tags", "entry": entry}
    return compute_score(
        f"reasoning_gym/{generator}", f"<answer>{answer}</answer>", reference, extra
    )


@pytest.mark.parametrize("generator", GYM)
def test_no_answer_to_reasoning_gym_is_evaluated(tmp_path, generator):
    pytest.importorskip("reasoning_gym")
    canary = tmp_path / "canary"
    for injection in injections(canary):
        assert gym_score(generator, injection, "x**2", GYM[generator])["score"] < 0.1
    assert not canary.exists()


def test_the_injections_work_where_nothing_guards(tmp_path):
    """Or the tests above would prove nothing: reasoning-gym's own scorers, without the worker."""
    pytest.importorskip("reasoning_gym")
    code = (
        "import reasoning_gym, sys\n"
        "entry = {'answer': 'x', 'metadata': {'numbers': [1], 'target': 1}}\n"
        "reasoning_gym.get_score_answer_fn(sys.argv[1])(sys.argv[2], entry)\n"
    )
    for generator, number in (("countdown", 1), ("countdown", 4), ("string_insertion", 2)):
        canary = tmp_path / f"{generator}-{number}"
        subprocess.run(
            [sys.executable, "-c", code, generator, injections(canary)[number]],
            check=False,
            capture_output=True,
        )
        assert canary.exists(), (generator, number)


def test_every_evaluation_in_reasoning_gym_is_known():
    """A new version may evaluate elsewhere: then the guard needs another look."""
    package = pytest.importorskip("reasoning_gym")
    root = Path(package.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(
            r"(?<![\w.])(eval|exec)\(|sympify\(|(sp|sympy)\.parse_expr|import parse_expr",
            path.read_text(),
        )
    }
    assert found == {
        "algebra/intermediate_integration.py", "algebra/polynomial_multiplication.py",
        "algebra/simple_integration.py",
        "algorithmic/binary_matrix.py", "algorithmic/number_sorting.py",
        "algorithmic/spiral_matrix.py",
        "algorithmic/string_insertion.py", "arithmetic/basic_arithmetic.py",
        "arithmetic/bitwise_arithmetic.py", "arithmetic/gsm_symbolic/generators_00_49.py",
        "arithmetic/gsm_symbolic/generators_50_99.py", "code/codeio.py",
        "games/countdown.py", "games/n_queens.py", "games/puzzle24.py",
    }  # fmt: skip


def test_guarded_scorers_still_score():
    pytest.importorskip("reasoning_gym")
    assert gym_score("countdown", "2+1", "1 + 2", GYM["countdown"])["score"] == 1.0
    assert (
        gym_score("simple_integration", "x**2 + C", "x**2 + C", GYM["simple_integration"])["score"]
        == 1.0
    )
    assert (
        gym_score("spiral_matrix", "[1, 2, 3]", "1 2 3", {})["score"]
        > gym_score("spiral_matrix", "[1, 2]", "1 2 3", {})["score"]
    )


def test_every_generators_reference_answer_gets_its_own_score():
    """All of reasoning-gym's generators, through the files' JSON and the worker, against the scorer
    called here.
    """
    package = pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    from capo_verl.data.gym import OVERSAMPLING, gym_rows
    from capo_verl.data.templates import TEMPLATES

    names = sorted(DATASETS.keys() - {"composite"})
    assert len(names) > 100
    perfect = 0
    for name in names:
        (row,) = gym_rows(f"reasoning_gym/{name}", {"test": 1}, 7, {}, TEMPLATES["tags"])["test"]
        reference = row["reward_model"]["ground_truth"]
        result = compute_score(
            row["data_source"], f"<answer>{reference}</answer>", reference, row["extra_info"]
        )
        entry = next(iter(package.create_dataset(name, seed=7, size=OVERSAMPLING)))
        own = package.get_score_answer_fn(name)(reference, entry)
        assert result["score"] == own, (name, reference, result)
        perfect += own == 1.0
    assert perfect >= 95  # a few have no reference answer: every valid one counts


def test_quickstart_rows_are_scored_too():
    """Their extra_info has no answer_format: the response is the answer."""
    pytest.importorskip("reasoning_gym")
    entry = json.dumps(
        {
            "question": "sun",
            "answer": "nus",
            "metadata": {"source_dataset": "spell_backward", "word": "sun"},
        }
    )
    arguments = (
        "reasoning_gym/spell_backward",
        "nus",
        "nus",
        {"index": 0, "split": "test", "entry": entry},
    )
    assert compute_score(*arguments)["score"] == 1.0
    wrong = compute_score(
        "reasoning_gym/spell_backward", "nux", "nus", arguments[3], partial_credit=False
    )
    assert (wrong["score"], wrong["acc"]) == (0.0, 0.0)


def test_rows_that_cannot_be_scored():
    with pytest.raises(ValueError, match="reasoning_gym/x: extra_info.entry is missing"):
        compute_score("reasoning_gym/x", "1", "1", {"entry": ""})
    with pytest.raises(ValueError, match="ground_truth=3 is not a non-empty string"):
        compute_score("math", "\\boxed{1}", 3)
    with pytest.raises(ValueError, match="answer_format='box'"):
        compute_score("math", "\\boxed{1}", "1", {"answer_format": "box"})


def test_number_of_workers_is_checked(monkeypatch):
    monkeypatch.setenv("CAPO_REWARD_WORKERS", "none")
    with pytest.raises(ValueError, match="CAPO_REWARD_WORKERS='none'"):
        score("1.0", "1")


def test_a_worker_that_was_killed_is_replaced():
    pool = Pool("math", 1)
    try:
        assert pool.judge({"reference": "1", "answer": "1.0"}, 20.0) == Verdict(1.0)
        (before,) = pool.pids()
        os.kill(before, signal.SIGKILL)
        assert pool.judge({"reference": "1", "answer": "2"}, 20.0) == Verdict(0.0)
        (after,) = pool.pids()
        assert after != before
    finally:
        pool.close()
    assert pool.pids() == []


def test_a_worker_that_dies_while_judging_is_told_from_a_slow_one():
    pool = Pool("math", 1)
    stop = threading.Event()

    def kill_all() -> None:
        while not stop.wait(0.5):
            for pid in pool.pids():
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    try:
        killer.start()
        assert pool.judge({"reference": "1", "answer": "9^{9^{9^{9}}}"}, 20.0) == Verdict(
            0.0, "died"
        )
        stop.set()
        assert pool.judge({"reference": "1", "answer": "9^{9^{9^{9}}}"}, 0.5) == Verdict(
            0.0, "timeout"
        )
    finally:
        stop.set()
        killer.join()
        pool.close()


def test_workers_end_with_their_parent():
    code = (
        "from capo_verl.data.rewards.pool import pool\n"
        "p = pool('math', 1); p.judge({'reference': '1', 'answer': '2'}, 20.0)\n"
        "print(p.pids()[0], flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while Path(f"/proc/{done.stdout.strip()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "math_verify").mkdir()
    (tmp_path / "math_verify/__init__.py").write_text(
        "raise ModuleNotFoundError('no', name='math_verify')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pool = Pool("math", 1)
    with pytest.raises(
        RuntimeError,
        match=r"did not start: math_verify is missing; pip install 'capo-verl\[data\]'",
    ):
        pool.judge({"reference": "1", "answer": "2"}, 20.0)


def test_a_worker_that_is_not_ready_in_time_costs_its_answer_only(monkeypatch, caplog):
    """Started twice, then 0 and one warning; the next answer starts one again."""
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: (
        started.append(args), popen(*args, **kwargs))[1])  # fmt: skip
    pool = Pool("math", 1)
    request = {"reference": "1", "answer": "1.0"}
    with monkeypatch.context() as patch:
        patch.setattr("capo_verl.data.rewards.pool.START_SECONDS", 0.01)
        assert [pool.judge(request, 20.0) for _ in range(2)] == 2 * [Verdict(0.0, "not started")]
    assert len(started) == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no process that judges answers (math) was ready within 0.01 s, twice" in caplog.text
    assert pool.judge(request, 20.0) == Verdict(1.0)
    pool.close()


def test_answers_that_hang_cost_their_limit_and_no_start():
    """Nothing is imported anew after one: the next answer is judged by a fork."""
    pool = Pool("math", 1)
    right = {"reference": "\\frac{1}{2}", "answer": "0.5"}
    assert pool.judge(right, 20.0) == Verdict(1.0)
    (before,) = pool.pids()
    template = next(iter(pool._workers))._process.pid
    for _ in range(5):
        assert pool.judge({"reference": "5", "answer": SLOW[0]}, 0.3) == Verdict(0.0, "timeout")
        assert pool.judge(right, 20.0) == Verdict(1.0)
    (after,) = pool.pids()
    assert after != before and next(iter(pool._workers))._process.pid == template
    pool.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{after}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_no_worker_has_judged_is_not_remembered(monkeypatch):
    verdicts = iter([Verdict(0.0, "not started"), Verdict(1.0)])
    monkeypatch.setattr(Pool, "judge", lambda *_: next(verdicts))
    first, second = (score("\\frac{2}{4}", "0.5") for _ in range(2))
    assert (first["score"], first["judge_failed"]) == (0.0, 1.0)
    assert (second["score"], second["judge_failed"]) == (1.0, 0.0)


def test_verls_own_loader_and_reward_manager():
    """``custom_reward_function.path=pkg://...``, then verl's naive reward manager, which calls it
    in a thread.
    """
    pytest.importorskip("verl")
    import asyncio

    import numpy as np
    import torch
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
    from verl.trainer.ppo.reward import get_custom_reward_fn

    custom = {
        "path": "pkg://capo_verl.rewards.math_answers",
        "name": "compute_score",
        "reward_kwargs": {"timeout_seconds": 1.0},
    }
    function = get_custom_reward_fn(
        OmegaConf.create({"reward": {"custom_reward_function": custom}})
    )

    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return ["\\boxed{0.5}", "\\boxed{9^{9^{9^{9}}}}"][int(ids[0])]

    rows = DataProto.from_dict(
        tensors={
            "responses": torch.tensor([[0], [1]]),
            "attention_mask": torch.ones(2, 2, dtype=torch.long),
        },
        non_tensors={
            "data_source": np.array(["math"] * 2, dtype=object),
            "reward_model": np.array([{"ground_truth": "1/2"}] * 2, dtype=object),
            "extra_info": np.array([{"answer_format": "boxed"} for _ in range(2)], dtype=object),
        },
    )

    async def run() -> list[dict]:
        manager = NaiveRewardManager(OmegaConf.create({}), Tokenizer(), function)
        manager.loop = asyncio.get_running_loop()
        return await asyncio.gather(*(manager.run_single(rows[i : i + 1]) for i in range(2)))

    right, slow = asyncio.run(run())
    assert right["reward_score"] == 1.0 and slow["reward_score"] == 0.0
    assert slow["reward_extra_info"]["judge_failed"] == 1.0
    assert right["reward_extra_info"].keys() == slow["reward_extra_info"].keys() == KEYS
