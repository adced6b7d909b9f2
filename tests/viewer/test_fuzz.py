# SPDX-License-Identifier: Apache-2.0
"""Any bytes in the place of a log: they are read, or refused by one ``ValueError``, in short time.

``HYPOTHESIS_PROFILE=fuzz`` tries many more of them.
"""

from __future__ import annotations

import json
import signal
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo_verl.viewer.file_log import FileLog
from capo_verl.viewer.groups import group_runs
from capo_verl.viewer.load import load_runs
from capo_verl.viewer.page import render
from capo_verl.viewer.samples import read_samples
from tests.viewer.logs import capo_rows, sample
from tests.viewer.test_damage import record_starts, wandb_file

SECONDS = 20
"""An example takes at most; one of the bounds is missing if it takes longer."""
LOG = "".join(json.dumps({"step": s, "data": d}) + "\n" for s, d in capo_rows(3)).encode()
SAMPLES = "".join(json.dumps(sample(s, 0, ["a", "é"], [1])) + "\n" for s in (1, 2)).encode()
YAML = b"""
data: {train_batch_size: 4, seed: 1}
actor_rollout_ref: {rollout: {n: 8}, actor: {policy_loss: {capo: {policy_shift_max: 1e-4}}}}
trainer: {default_local_dir: "${data.seed}/x", a: &a [1, .inf, {b: ~}], c: *a, d: "${oc.env:HOME}"}
"""
JSON = json.dumps({"data": {"seed": 1, "x": [1, None, {"y": 1e9}]}}).encode()
WORDS = (
    b"Infinity", b"NaN", b"-", b"null", b"true", b'"', b"\\ud800", b"[" * 2000, b"{", b"}", b"]",
    b",", b":", b"\n", b"\xff", b"\x00", b"1" * 400, b"1e999", b"&a ", b"*a", b"<<: ", b"${", b"}",
    b"!!int ", b"step", b"data", b"\xe2\x80\xa8",
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """Valid content, some of which is cut out, doubled, or replaced."""
    content = valid
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 40)))
        new = draw(
            st.sampled_from(WORDS) | st.binary(max_size=12) | st.just(content[start:end] * 2)
        )
        content = content[:start] + new + content[end:]
    return content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


def content(valid: bytes) -> st.SearchStrategy[bytes]:
    return mutated(valid) | st.binary(max_size=200)


@contextmanager
def in_time() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"an example took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def read(files: dict[str, bytes]) -> list[str]:
    """Load a folder of these files and render its page; returns the notes, or the refusal alone."""
    lost: list[str] = []
    with tempfile.TemporaryDirectory() as folder, in_time(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, inside in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(inside)
        try:
            runs = load_runs([Path(folder)], lost.append)
        except ValueError as e:
            assert folder in str(e)
            return [str(e)]
        render(group_runs(runs), "title").encode("utf-8")
    return [*lost, *(note for run in runs for note in run.notes)]


@given(content(LOG))
def test_verls_file_log(inside):
    read({"metrics.jsonl": inside})


@given(content(LOG))
def test_a_log_that_is_followed(inside):
    with tempfile.TemporaryDirectory() as folder, in_time():
        path = Path(folder) / "m.jsonl"
        path.write_bytes(inside)
        try:
            entries = FileLog(path).new_entries()
        except ValueError as e:
            assert f"{path}, line " in str(e)
        else:
            assert all(type(entry.step) is int and entry.step >= 0 for entry in entries)


@given(content(YAML))
def test_configuration_in_yaml(inside):
    read({"metrics.jsonl": LOG, ".hydra/config.yaml": inside})


@given(content(JSON))
def test_configuration_in_json(inside):
    read({"metrics.jsonl": LOG, "run.json": inside})


@given(content(SAMPLES))
def test_samples_beside_a_log(inside):
    read({"metrics.jsonl": LOG, "capo_tokens.jsonl": inside})


@given(content(SAMPLES))
def test_samples_alone(inside):
    with tempfile.TemporaryDirectory() as folder, in_time():
        path = Path(folder) / "capo_tokens.jsonl"
        path.write_bytes(inside)
        try:
            read_samples(path)
        except ValueError as e:
            assert f"{path}, line " in str(e)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Content of the logs that other packages write, by file name."""

    def make(name: str) -> bytes:
        folder = tmp_path_factory.mktemp("valid")
        if name.endswith(".wandb"):
            return wandb_file([float(step) for step in range(3)])
        if name.endswith(".parquet"):
            pd = pytest.importorskip("pandas")
            table = {
                "runs.parquet": {"run_id": ["a"], "lr": [1e-3], "config": ['{"x": 1}']},
                "curves.parquet": {"run_id": ["a", "a"], "step": [0, 1], "accuracy": [0.1, 0.2]},
            }[name]
            pd.DataFrame(table).to_parquet(folder / name)
            return (folder / name).read_bytes()
        writer_module = pytest.importorskip("torch.utils.tensorboard")
        writer = writer_module.SummaryWriter(str(folder))
        for step in range(3):
            writer.add_scalar("actor/entropy", float(step), step)
        writer.close()
        return next(folder.iterdir()).read_bytes()

    found: dict[str, bytes] = {}
    return lambda name: found[name] if name in found else found.setdefault(name, make(name))


@pytest.mark.parametrize(
    "name", ["events.out.tfevents.1", "run-1.wandb", "runs.parquet", "curves.parquet"]
)
@given(data=st.data())
def test_logs_of_other_writers(valid, name, data):
    others = {"runs.parquet": "curves.parquet", "curves.parquet": "runs.parquet"}
    beside = {others[name]: valid(others[name])} if name in others else {}
    read({name: data.draw(content(valid(name))), **beside})


@given(data=st.data())
def test_records_with_a_right_checksum_and_any_content(valid, data):
    masked_crc32c = pytest.importorskip(
        "tensorboard.compat.tensorflow_stub.pywrap_tensorflow"
    ).masked_crc32c
    events = valid("events.out.tfevents.1")
    starts = record_starts(events)
    written = b""
    for start, end in zip(starts, [*starts[1:], len(events)], strict=True):
        inside = data.draw(content(events[start + 12 : end - 4]))
        length = struct.pack("<Q", len(inside))
        written += length + struct.pack("<I", masked_crc32c(length))
        written += inside + struct.pack("<I", masked_crc32c(inside))
    read({"events.out.tfevents.1": written})
    inside = data.draw(content(valid("run-1.wandb")[14:300]))
    head = struct.pack("<IHB", zlib.crc32(b"\x01" + inside), len(inside), 1)
    read({"run-1.wandb": valid("run-1.wandb")[:7] + head + inside})


@given(st.dictionaries(st.text(max_size=5), st.floats() | st.integers() | st.none(), max_size=5))
def test_any_numbers_of_any_metric(numbers):
    names = ("actor/entropy", "capo/kl_mean", "capo/objective_shift_p50", "response_length/mean")
    drawn = dict(zip(names, numbers.values(), strict=False))
    lines = [json.dumps({"step": s, "data": {**numbers, **drawn}}) for s in (1, 2)]
    read({"metrics.jsonl": "\n".join(lines).encode() + b"\n" + LOG})


def test_what_is_valid_has_no_notes(valid):
    assert read({"metrics.jsonl": LOG, "capo_tokens.jsonl": SAMPLES, "run.json": JSON}) == []
    assert read({"metrics.jsonl": LOG, ".hydra/config.yaml": YAML}) == []
    assert read({name: valid(name) for name in ("runs.parquet", "curves.parquet")}) == []
    for name in ("events.out.tfevents.1", "run-1.wandb"):
        assert read({name: valid(name)}) == []
