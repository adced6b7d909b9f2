# SPDX-License-Identifier: Apache-2.0
"""``capo-verl doctor --gpu``: rehearsed on a CPU, and what is refused, judged and told."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from capo_verl.commands.doctor import verdict
from capo_verl.commands.doctor.check import Result
from capo_verl.commands.doctor.gpu import kernels, layer, parts, speed, training, waits
from capo_verl.commands.doctor.gpu.rows import Row
from capo_verl.commands.main import main
from capo_verl.commands.measure.memory import Usage
from capo_verl.commands.measure.oracle import Oracle, make_token
from capo_verl.commands.measure.results import Report, Traffic
from capo_verl.commands.measure.results import Result as Measured
from capo_verl.core.kernels import plain
from tests.commands.doctor.command import doctor

CPU = torch.device("cpu")
GPU_ONLY = "not run here: torch.cuda.set_sync_debug_mode asks CUDA, and this is a CPU"
REHEARSED = {
    "kernels torch", "kernels triton", "waits", "filter evaluate", "filter update", "filter memory",
    "filter bandwidth", "filter speedup", "filter share", "engine shifts", "engine decisions",
    "engine moments", "filter in training", "KL budget share",
}  # fmt: skip


def test_the_rehearsal_runs_every_part(tmp_path):
    """Figures of a GPU may be missed, and are told as such; the rest holds on a CPU, too."""
    pytest.importorskip("triton")
    file = tmp_path / "gpu.json"
    done = doctor("--gpu", "--device", "cpu", "--json", "--output", str(file))
    found = json.loads(done.stdout)
    assert json.loads(file.read_text()) == found
    rows = {row["name"]: row for row in found["checks"]}
    assert rows.keys() == REHEARSED, rows
    missed = [name for name, row in rows.items() if row["status"] == "FAIL"]
    assert found["fell_short"] == missed
    assert done.returncode == int(bool(missed))
    held = ("kernels torch", "kernels triton", "filter memory", "engine shifts", "engine decisions",
            "engine moments", "filter in training")  # fmt: skip
    assert {name: rows[name]["status"] for name in held} == dict.fromkeys(held, "ok")
    assert (rows["waits"]["status"], rows["waits"]["message"]) == ("skipped", GPU_ONLY)
    assert found["device"].startswith("CPU: a rehearsal")
    assert {"versions", "stacks", "platform", "status"} <= found.keys()


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU of so many GB."""

    def pretend(total, free, triton=True):
        find_spec = importlib.util.find_spec
        there = lambda name, *rest: (triton or None) if name == "triton" else find_spec(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", there)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "L4")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 1e9), int(total * 1e9)))

    return pretend


@pytest.mark.parametrize(
    ("sizes", "refused"),
    [
        ((23.7, 23.0), None),
        ((16.0, 15.0), "--gpu: L4 has 16.0 GB: use a GPU of 24 GB at least"),
        (
            (80.0, 3.0),
            "--gpu: of the 80.0 GB of L4 only 3.0 are free: end what else runs there",
        ),
        (
            (80.0, 79.0, False),
            "--gpu: triton, in which the kernels are written, is missing: pip install triton",
        ),
    ],
)
def test_what_a_gpu_lacks_is_one_sentence(sizes, refused, gpu):
    gpu(*sizes)
    assert parts.refusal("cuda") == refused


NO_GPU = "finds no GPU here: run it where one is, or rehearse it with --device cpu\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu"], NO_GPU),
        (["--gpu", "--json"], NO_GPU),
        (["--gpu", "--no-ray"], "--gpu looks at one GPU and nothing else: leave out --no-ray\n"),
        (["--gpu", "x=1"], "--gpu looks at one GPU and nothing else: leave out 'x=1'\n"),
        (["--device", "cpu"], "--device is the device of --gpu: add --gpu, or leave it out\n"),
        (["--output", "no/folder.json"], "--output no/folder.json: its folder does not exist\n"),
    ],
)
def test_wrong_usage(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("capo-verl doctor: ")
    assert said.err.endswith(message) and said.err.count("\n") == 1


def test_an_output_that_a_kernel_leaves_out_is_seen(monkeypatch):
    """Its memory was NaN before."""
    monkeypatch.setattr(kernels, "NAMES", ("torch",))
    monkeypatch.setattr(plain, "row_sums", lambda entries, rows, hidden: torch.empty(
        len(rows), hidden.shape[1]))  # fmt: skip
    (row,) = kernels.examine(CPU)
    assert row.status == "FAIL"
    assert "row_sums (5 tokens, 150 rows, 300 hidden units) by nan" in row.message


def test_without_triton_only_torchs_kernels_are_compared(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == "triton" else find_spec(n, *rest)
    )
    rows = {row.name: (row.status, row.message) for row in kernels.examine(CPU)}
    assert rows["kernels torch"][0] == "ok"
    assert rows["kernels triton"] == (
        "skipped", "not run here: triton is not installed (pip install triton)",
    )  # fmt: skip


def test_a_wait_is_told_with_its_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waiting():
        raise RuntimeError("called a synchronizing CUDA operation")

    found = waits.wait(waiting)
    assert found.startswith("called a synchronizing CUDA operation (") and "test_gpu.py:" in found
    assert waits.wait(lambda: None) == "" and modes == ["error", "default"] * 2


@pytest.mark.parametrize("optimizer_model", ["adam", "sgd"])
def test_what_is_asked_to_wait_for_nothing_runs(optimizer_model, monkeypatch):
    monkeypatch.setattr(waits, "TOKENS", 16)
    step = waits.one_step(optimizer_model, 64, CPU)
    for _ in range(2):
        step()


SETTING = speed.SETTINGS["cuda"]


@pytest.mark.parametrize(
    ("free", "tokens", "beside_naive"),
    [(140e9, 24576, 24576), (79e9, 24576, 16384), (23e9, 16384, 2048), (1e9, 0, 0)],
)
def test_fewer_tokens_where_there_is_less_memory(free, tokens, beside_naive, monkeypatch):
    monkeypatch.setattr(speed, "free_bytes", lambda device: int(free))
    device = torch.device("cuda")
    assert speed._that_fit(SETTING, device) == tokens
    assert speed._that_fit(SETTING, device, speed.NAIVE) == beside_naive


def report(kinds, tokens, evaluate):
    """As the benchmark measures it on a GPU that copies 4 TB a second."""
    times = {"triton": evaluate, "naive": 60 * evaluate}
    memory = {"evaluate": Usage(200 << 20, 0), "step": Usage(0, 0)}
    results = [
        Measured(kind.key, tokens, {"evaluate": [times[kind.key]], "step": [0.01]}, memory)
        for kind in kinds
    ]
    return Report("", {}, {}, 4e12, {}, [Traffic(tokens, 1, int(5e10), 1, 1)], results)


@pytest.mark.parametrize(
    ("tokens", "evaluate", "missed"),
    [
        (24576, 0.028, ["filter share"]),  # 38 ms of 2 s
        (24576, 0.035, ["filter evaluate", "filter bandwidth", "filter share"]),
        (16384, 0.019, ["filter share"]),
        (16384, 0.021, ["filter evaluate", "filter share"]),
    ],
)
def test_targets_of_the_filter(tokens, evaluate, missed, monkeypatch):
    monkeypatch.setattr(speed, "_that_fit", lambda *_: tokens)
    monkeypatch.setattr(speed, "update_seconds", lambda *_: 2.0)
    monkeypatch.setattr(
        speed.runner, "run", lambda workload, repeats, say, kinds, compare: report(
            kinds, workload.tokens[0], evaluate)
    )  # fmt: skip
    rows = speed.examine(torch.device("cuda"))
    assert [row.name for row in rows if row.status == "FAIL"] == missed
    scaled = "(24,576 tokens do not fit: limits of times in proportion)"
    assert (scaled in rows[0].message) == (tokens < 24576)
    assert f"<= {30 * tokens / 24576:g}, measured {1e3 * evaluate:.3g}" in rows[0].message
    speedup = next(row for row in rows if row.name == "filter speedup")
    assert speedup.message.startswith(f"evaluate, {tokens:,} tokens: times as fast as (a) >= 50, ")


def test_an_update_is_computed_in_proportion(monkeypatch):
    monkeypatch.setattr(layer, "_seconds", lambda module, x: 2.0 if module.__class__ is layer.Layer
                        else 3.0)  # fmt: skip
    shape = replace(speed.SETTINGS["cpu"].shape, layers=5)
    assert layer.update_seconds(shape, 512, CPU, 2, 64) == 4 * (5 * 2 + 3)


def calls(threshold, wrong=(), shift=0.0):
    """What a filter would have been given and found in two steps, by the oracle itself.

    Args:
        wrong: tokens of the second step whose decision is turned round.
        shift: by which m_F is off, as a share.
    """
    rng, oracle, steps = np.random.default_rng(0), Oracle(30, 8, top_k=5), []
    for _ in range(2):
        hidden, logits, advantages = (rng.normal(size=(6, n)) for n in (8, 30, 1))
        actions = logits.argmax(1)
        tokens = [
            make_token(h, z, a, float(x[0]), 5)
            for h, z, a, x in zip(hidden, logits, actions, advantages, strict=True)
        ]
        shifts = np.array([oracle.token_shifts(t, 0.1) for t in tokens])
        accepted = shifts[:, 1] < threshold
        for i in wrong if steps else ():
            accepted[i] = not accepted[i]
        oracle.update([t for t, taken in zip(tokens, accepted, strict=True) if taken])
        found = shifts[:, 1] * (1 + shift)
        steps.append(
            [training.Call(hidden, logits, actions, advantages[:, 0], shifts[:, 0], found, accepted,
                           0.1, threshold)]
        )  # fmt: skip
    state = {name: torch.tensor(getattr(oracle, name)) for name in ("exp_avg", "exp_avg_sq")}
    capo = SimpleNamespace(
        model=SimpleNamespace(betas=oracle.betas, eps=oracle.eps), hidden_size=8,
        shard=SimpleNamespace(vocab_size=30), config=SimpleNamespace(top_k=5),
        state_dict=lambda: state,
    )  # fmt: skip
    return steps, capo


def second_step_shifts():
    return calls(math.inf)[0][1][0].policy_shift


@pytest.mark.parametrize(
    ("arguments", "missed"),
    [
        ({}, []),
        ({"wrong": (2,)}, ["engine decisions"]),
        ({"shift": 1e-3}, ["engine shifts"]),
        ({"threshold": math.inf}, ["engine decisions"]),  # nothing was decided
    ],
    ids=str,
)
def test_decisions_are_held_to_the_oracle(arguments, missed):
    threshold = float(np.median(second_step_shifts())) * 1.01
    steps, capo = calls(**{"threshold": threshold, **arguments})
    rows = training.compare(steps, capo)
    assert [row.name for row in rows if row.status == "FAIL"] == missed


def test_a_tie_may_go_either_way():
    at = second_step_shifts()
    threshold = float(np.sort(at)[3]) * (1 + 1e-5)
    steps, capo = calls(threshold, wrong=(int(np.argsort(at)[3]),))
    decisions = training.compare(steps, capo)[1]
    assert decisions.status == "ok" and "1 ties left out" in decisions.message


def test_moments_that_differ_are_seen():
    steps, capo = calls(float(np.median(second_step_shifts())))
    capo.state_dict()["exp_avg"][3, 2] += 1.0
    assert training.compare(steps, capo)[2].status == "FAIL"


def test_a_part_that_crashes_fails_alone(monkeypatch):
    broken = parts.Part("no_such_module", "examine", 60)
    monkeypatch.setattr(parts, "PARTS", {"broken": broken, "waits": parts.PARTS["waits"]})
    told = []
    results = parts.examine("cpu", told.append)
    assert told == results
    assert [(r.name, r.status) for r in results] == [("broken", "FAIL"), ("waits", "skipped")]
    assert results[0].message.startswith("it could not be examined: ")


def test_ten_minutes_are_enough():
    assert sum(part.seconds for part in parts.PARTS.values()) <= 600


def test_what_fell_short_is_listed():
    results = [Result(*Row("a", "ok", "fine"), 1.0), Result(*Row("b", "FAIL", "2 of 1"), 0.0)]
    assert verdict.short(results) == "fell short:\n  b: 2 of 1"
    assert verdict.short(results[:1]) == ""
    assert verdict.as_dict(results, [SimpleNamespace(
        python=SimpleNamespace(found="3"), packages=(), as_dict=dict)], "L4")["fell_short"] == [
        "b"]  # fmt: skip
