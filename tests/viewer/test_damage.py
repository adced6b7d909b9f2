# SPDX-License-Identifier: Apache-2.0
"""What is damaged is named and left out; the rest is read, drawn and shown."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import time
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from capo_verl.commands.main import main
from capo_verl.viewer.config import find_config
from capo_verl.viewer.derived import ACCURACY, COMPLETIONS
from capo_verl.viewer.file_log import FileLog
from capo_verl.viewer.groups import band, group_runs
from capo_verl.viewer.load import load_runs
from capo_verl.viewer.notes import spans, visible
from capo_verl.viewer.page import page_data, render
from capo_verl.viewer.panels import PANELS
from capo_verl.viewer.plain import MOST_VALUES, plain
from capo_verl.viewer.samples import read_samples
from capo_verl.viewer.wandb_log import BLOCK
from tests.viewer.logs import capo_rows, sample, write_file_log, write_samples

ENTROPY = "actor/entropy"
ENTROPY_PANEL = next(panel for panel in PANELS if panel.key == "entropy")
REPEATED = ", ".join(["*{}"] * 9)
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{i}: &a{i} [{REPEATED.replace('{}', f'a{i - 1}')}]\n" for i in range(1, 8)
)
"""Four million values in 390 bytes."""
MERGED = BOMB.replace("[x]", "{x: 1}").replace("[*", "{<<: [*").replace("]\n", "]}\n")


def write_entropy(path: Path, values: list[object]) -> Path:
    return write_file_log(path, [(step, {ENTROPY: v}) for step, v in enumerate(values)])


def write_yaml(folder: Path, text: str) -> Path:
    write_file_log(folder / "metrics.jsonl", capo_rows(3))
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(text, encoding="utf-8")
    return folder


def gaps(values: list[float]) -> list[int]:
    return [step for step, value in enumerate(values) if math.isnan(value)]


# NaN, infinity, and what no axis can hold


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, 1e308, -1e308, 10**400])
def test_a_value_that_cannot_be_drawn_is_a_gap_and_a_note(tmp_path, value):
    (run,) = load_runs([write_entropy(tmp_path / "m.jsonl", [1.0, value, value, 4.0, value, 6.0])])
    assert gaps(run.series[ENTROPY].values) == [1, 2, 4]
    assert run.notes == [
        f"{tmp_path}/m.jsonl: actor/entropy: NaN, infinite or beyond 1e+100 at steps 1 to 2, 4; a "
        "gap in the line"
    ]


@pytest.mark.parametrize("command", ["plot", "report"])
def test_a_gap_is_told_on_standard_error(tmp_path, capsys, command):
    log = write_entropy(tmp_path / "m.jsonl", [1.0, math.nan, 3.0])
    assert main([command, str(log), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == (
        f"capo-verl {command}: note: {log}: actor/entropy: NaN, infinite or beyond 1e+100 at step "
        "1; a gap in the line\n"
    )


def test_a_gap_stays_in_the_picture(tmp_path):
    drawing = pytest.importorskip("capo_verl.viewer.drawing")
    values = [1.0, 2.0, math.nan, 3.0, math.nan, *([4.0] * 10)]
    groups = group_runs(load_runs([write_entropy(tmp_path / "m.jsonl", values)]))
    line, alone = drawing.draw(groups, [ENTROPY_PANEL], "steps").axes[0].lines
    assert gaps(line.get_ydata()) == [2, 4]
    assert [list(xs) for xs in alone.get_data()] == [[3.0], [3.0]]  # no line to a neighbour


def test_a_gap_stays_on_the_page(tmp_path):
    runs = load_runs([write_entropy(tmp_path / "m.jsonl", [1.0, math.nan, 3.0])])
    data = page_data(group_runs(runs), ["another.jsonl: lost"])
    assert data["runs"][0]["panels"]["entropy"] == [[[0, 1, 2], [1.0, None, 3.0]]]
    assert data["notes"] == ["another.jsonl: lost", *runs[0].notes]


def test_the_mean_of_seeds_has_a_gap_where_one_of_them_has(tmp_path):
    for seed, values in enumerate([[1.0, 2.0, 3.0], [3.0, math.nan, 5.0]]):
        write_entropy(tmp_path / f"run-seed{seed}" / "metrics.jsonl", values)
    (group,) = group_runs(load_runs([tmp_path]))
    found = band(ENTROPY_PANEL, ENTROPY_PANEL.curves[0], group, "steps")
    assert [gaps(values) for values in (found.mean, found.low, found.high)] == [[1]] * 3
    assert (found.mean[0], found.mean[2]) == (2.0, 4.0)


def test_a_held_out_set_without_a_number_is_a_gap_in_the_accuracy(tmp_path):
    names = ("val-core/a/acc/mean@1", "val-core/b/acc/mean@1")
    rows = [(step, dict.fromkeys(names, 0.5)) for step in range(3)]
    rows[1][1][names[1]] = math.nan
    (run,) = load_runs([write_file_log(tmp_path / "m.jsonl", rows)])
    assert gaps(run.series[ACCURACY].values) == [1]
    assert "val-core/b/acc/mean@1: NaN" in run.notes[0]


def test_a_step_without_a_number_of_tokens_counts_as_the_next(tmp_path):
    rows = [(step, dict(data)) for step, data in capo_rows(4)]
    rows[2][1]["perf/total_num_tokens"] = math.nan
    (run,) = load_runs([write_file_log(tmp_path / "m.jsonl", rows)])
    assert run.series[COMPLETIONS].at() == {0: 0.0, 1: 32.0, 2: 32.0, 3: 96.0, 4: 128.0}


@pytest.mark.parametrize("command", ["plot", "report"])
def test_a_run_of_nan_alone_says_so_and_does_not_refuse_the_others(tmp_path, capsys, command):
    write_entropy(tmp_path / "bad" / "metrics.jsonl", [math.nan] * 3)
    write_entropy(tmp_path / "good" / "metrics.jsonl", [1.0, 2.0])
    assert main([command, str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    assert (
        f"{tmp_path}/bad/metrics.jsonl: every value of actor/entropy is NaN, infinite or beyond "
        "1e+100; none is drawn"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plot", "report"])
@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [("own/metric", 1.0, "lists them)\n"), (ENTROPY, math.nan, "every value of actor/entropy")],
)
def test_nothing_to_draw_is_refused_by_both_commands(
    tmp_path, capsys, command, metric, value, said
):
    log = write_file_log(tmp_path / "m.jsonl", [(1, {metric: value})])
    assert main([command, str(log), "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"capo-verl {command}: nothing to draw: none of the runs has a metric")
    assert said in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_report_of_samples_alone_needs_no_metric(tmp_path):
    write_samples(tmp_path / "capo_tokens.jsonl", [sample(1, 0, ["a"], [])])
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 0


def test_values_at_the_edge_of_what_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        (s, {ENTROPY: 1e100 * (-1) ** s, "capo/kl_mean": 10.0 ** (100 * (-1) ** s)})
        for s in range(20)
    ]
    rows[3][1]["capo/lr_scale"] = 5e-324  # 0: a logarithmic axis leaves it out
    log = write_file_log(tmp_path / "m.jsonl", rows)
    assert main(["plot", str(log), "--output", str(tmp_path / "out")]) == 0
    assert {p.stem for p in (tmp_path / "out").iterdir()} == {"curves", "entropy", "kl"}


# verl's file log


DAMAGED_LINES = {
    "infinite step": '{"step": Infinity, "data": {}}',
    "step of 400 digits": f'{{"step": {"1" * 400}, "data": {{}}}}',
    "step of 5,000 digits": f'{{"step": {"1" * 5000}, "data": {{}}}}',
    "NaN step": '{"step": NaN, "data": {}}',
    "text step": '{"step": "5", "data": {}}',
    "true step": '{"step": true, "data": {}}',
    "negative step": '{"step": -1, "data": {}}',
    "half a step": '{"step": 1.5, "data": {}}',
    "no step": '{"data": {}}',
    "list of data": '{"step": 4, "data": [["actor/entropy", 1]]}',
    "no data": '{"step": 4}',
    "list": "[]",
    "deep list": '{"step": 4, "data": ' + "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "two in one": '{"step": 4, "da{"step": 5, "data": {}}',
    "other text": "Traceback",
    "long text": "x" * 2_000_000,
}


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES.keys())
@pytest.mark.parametrize("at", [0, 3])
def test_a_damaged_line_is_named_and_left_out(tmp_path, line, at):
    path = write_file_log(tmp_path / "m.jsonl", capo_rows(5))
    lines = path.read_text().splitlines()
    lines[at] = line
    path.write_text("\n".join(lines) + "\n")
    (run,) = load_runs([path])
    assert run.series[ENTROPY].steps == [step for step in range(1, 6) if step != at]
    (note,) = run.notes
    assert note.startswith(f"{path}, line {at + 1}: not a line of verl's file logger (")
    assert note.endswith("; it is left out") and len(note) < len(str(path)) + 250


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path):
    path = write_file_log(tmp_path / "m.jsonl", capo_rows(2))
    path.write_bytes(path.read_bytes() + b'{"step": 3, "data": {"\xff": 1}}\n')
    (run,) = load_runs([path])
    assert "line 4: not a line of verl's file logger (UnicodeDecodeError" in run.notes[0]


def test_damaged_lines_of_a_file_are_one_note(tmp_path):
    path = write_file_log(tmp_path / "m.jsonl", capo_rows(2))
    path.write_text(path.read_text() + "a\nb\nc\n" + '{"step": 3, "data": {}}\n' + "d\n")
    (run,) = load_runs([path])
    assert run.notes[0].startswith(f"{path}: lines 4 to 6, 8 are left out; line 4: not a line")


def test_a_log_that_is_followed_refuses_a_damaged_line_and_stays_where_it_was(tmp_path):
    path = write_file_log(tmp_path / "m.jsonl", capo_rows(1))
    good = path.read_bytes()
    path.write_bytes(good + b'{"step": "x", "data": {}}\n')
    log = FileLog(path)
    with pytest.raises(
        ValueError, match=r"m.jsonl, line 3: not a line .*its step is 'x'.*; remove the line, or"
    ):
        log.new_entries()
    path.write_bytes(good)
    assert [entry.step for entry in log.new_entries()] == [0, 1]


def test_repeated_steps_count_once(tmp_path):
    path = write_file_log(tmp_path / "m.jsonl", [(1, {ENTROPY: 1.0}), (1, {ENTROPY: 2.0})])
    assert load_runs([path])[0].series[ENTROPY].at() == {1: 2.0}


# One damaged run among others


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return "the file is empty; nothing has been logged yet"


def junk(path: Path) -> str:
    path.write_bytes(b"\xff\xfe\x00junk\n" * 3)
    return "not a log of a run; give verl's file logger"


def without_metrics(path: Path) -> str:
    path.write_text('{"step": 1, "data": {}}\n')
    return "no metrics in this log; the run has not finished a step yet"


def all_lines_damaged(path: Path) -> str:
    path.write_text('{"step": Infinity, "data": {}}\n')
    return "no metrics in this log"


@pytest.mark.parametrize("write", [empty, junk, without_metrics, all_lines_damaged])
@pytest.mark.parametrize("named", [True, False])
def test_a_log_that_cannot_be_read_is_named_and_the_others_are_drawn(
    tmp_path, capsys, write, named
):
    write_file_log(tmp_path / "good" / "metrics.jsonl", capo_rows(2))
    bad = tmp_path / "bad" / "metrics.jsonl"
    bad.parent.mkdir()
    why = write(bad)
    runs = [str(bad), str(tmp_path / "good")] if named else [str(tmp_path)]
    assert main(["report", *runs, "--output", str(tmp_path / "r.html")]) == 0
    told = capsys.readouterr()
    assert f"note: {bad}: {why}" in told.err
    assert "r.html: 1 runs" in told.out


def test_a_log_that_is_a_folder_is_looked_into(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match="metrics.jsonl: no log of a run in this folder; give"):
        load_runs([tmp_path / "metrics.jsonl"])


def test_another_kind_of_log_stands_in_for_a_damaged_one(tmp_path):
    write_file_log(tmp_path / "m.jsonl", capo_rows(2))
    (tmp_path / "runs.parquet").write_bytes(b"PAR1")
    lost: list[str] = []
    (run,) = load_runs([tmp_path], lost.append)
    assert run.source == tmp_path / "m.jsonl"
    assert len(lost) == 1 and lost[0].startswith(f"{tmp_path}/runs.parquet: ")


# Configurations


def test_nothing_of_the_readers_environment_gets_into_a_page(tmp_path, monkeypatch):
    omegaconf = pytest.importorskip("omegaconf")
    monkeypatch.setenv("HIDDEN_KEY", "s3cret")
    secret = tmp_path / "secret.txt"
    secret.write_text("s3cret")
    omegaconf.OmegaConf.register_new_resolver("leak", lambda: "s3cret", replace=True)
    text = """
plain: ${oc.env:HIDDEN_KEY}
default: ${oc.env:HIDDEN_KEY,none}
within: a/${oc.env:HIDDEN_KEY}/b
nested: ${oc.env:${name}}
name: HIDDEN_KEY
decoded: ${oc.decode:${oc.env:HIDDEN_KEY}}
selected: ${oc.select:plain}
refers: ${plain}
own: ${leak:}
list: ["${oc.env:HIDDEN_KEY}"]
${oc.env:HIDDEN_KEY}: key
trainer: {default_local_dir: "${oc.env:HIDDEN_KEY}"}
"""
    (run,) = load_runs([write_yaml(tmp_path, text)])
    assert "s3cret" not in render(group_runs([run]), "title")
    assert run.config["plain"] == run.config["refers"] == "${oc.env:HIDDEN_KEY}"
    assert run.config["own"] == "${leak:}"


def test_references_within_a_configuration_are_followed(tmp_path):
    text = (
        "data: {seed: 7}\na: ${data.seed}\nb: ${a}\nc: p/${b}/${data.seed}\nd: ${c.d}\n"
        "e: ${data}\nf: ${f}\ng: \\${a}\n"
    )
    config = find_config(write_yaml(tmp_path, text))
    assert config == {
        "data.seed": 7, "a": 7, "b": 7, "c": "p/7/7", "d": "${c.d}", "e": "${data}", "f": "${f}",
        "g": "\\${a}",
    }  # fmt: skip


BOMBS = {
    "lists": BOMB,
    "merged keys": MERGED,
    "many values": "\n".join(f"a{i}: {i}" for i in range(MOST_VALUES + 1)),
    "deep": "a: " + "[" * 60 + "]" * 60,
    "very deep": "[" * 100_000,
    "in itself": "a: &a [*a]",
    "number": "a: 1" + ":1" * 200_000,
    "size": "#" * (5 << 20),
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_a_configuration_cannot_take_long(tmp_path, text):
    start = time.monotonic()
    (run,) = load_runs([write_yaml(tmp_path, text)])
    assert time.monotonic() - start < 5  # 103 s before there were bounds, for the first
    assert run.config is None
    path = tmp_path / ".hydra" / "config.yaml"
    (note,) = run.notes
    assert note.startswith(f"{path}: cannot be read as a configuration (")
    assert note.endswith("; the run is shown without it")


def test_references_that_double_stay_short(tmp_path):
    text = "\n".join(f"a{i}: ${{a{i + 1}}}${{a{i + 1}}}" for i in range(40)) + "\na40: x\n"
    config = find_config(write_yaml(tmp_path, text))
    assert max(len(value) for value in config.values()) <= 1000
    assert config["a39"] == "xx"


def test_a_configuration_of_odd_values_is_plain(tmp_path):
    text = (
        "a: [.nan, .inf, {b: -.inf}]\nb: 2020-01-01\nc: !!binary aGk=\nd: !!set {x, y}\ne: 1e-3\n"
    )
    config = find_config(write_yaml(tmp_path, text))
    assert config == {
        "a": ["nan", "inf", {"b": "-inf"}], "b": "2020-01-01", "c": "b'hi'", "d": ["x", "y"],
        "e": 1e-3,
    }  # fmt: skip
    assert plain(2**53 + 1) == "9007199254740993" and plain(10**400) == "an integer of 1329 bits"


@pytest.mark.parametrize("place", ["x" * 5000, "a\0b"])
def test_a_place_of_samples_that_is_no_path(tmp_path, place):
    text = json.dumps({"trainer": {"default_local_dir": place}})
    assert load_runs([write_yaml(tmp_path, text)])[0].samples == []


def test_samples_from_elsewhere_are_noted(tmp_path):
    elsewhere = write_samples(tmp_path / "else" / "capo_tokens.jsonl", [sample(1, 0, ["a"], [])])
    text = json.dumps({"trainer": {"default_local_dir": str(elsewhere.parent)}})
    (run,) = load_runs([write_yaml(tmp_path / "run", text)])
    assert len(run.samples) == 1
    assert run.notes == [
        f"samples of {tmp_path}/run are those of {elsewhere}, which its configuration names"
    ]


# Samples of tokens


def change(**values: object) -> dict:
    return {**sample(2, 0, ["a", "b"], []), **values}


def change_response(**values: object) -> dict:
    entry = sample(2, 0, ["a", "b"], [])
    return {**entry, "response": {**entry["response"], **values}}


DAMAGED_SAMPLES = {
    "columns of different lengths": change_response(mask=[1]),
    "step": change(step="x"),
    "infinite step": change(step=math.inf),
    "sample": change(sample=-1),
    "no prompt": change(prompt=3),
    "ids of the prompt": change(prompt={"ids": ["a"]}),
    "text of the prompt": change(prompt={"ids": [1], "text": 5}),
    "ids": change_response(ids=[1, -1]),
    "text": change_response(text=["a"]),
    "kinds of text": change_response(text=["a", 1]),
    "words for numbers": change_response(weight="ab"),
    "no response": change(response=[1]),
    "list": [],
    "deep": "[" * 100_000,
    "cut off": '{"step": 2, "samp',
}


@pytest.mark.parametrize("entry", DAMAGED_SAMPLES.values(), ids=DAMAGED_SAMPLES.keys())
def test_a_damaged_sample_is_named_and_left_out(tmp_path, entry):
    write_file_log(tmp_path / "metrics.jsonl", capo_rows(2))
    path = tmp_path / "capo_tokens.jsonl"
    good = json.dumps(sample(1, 0, ["a"], []))
    path.write_text(f"{entry if isinstance(entry, str) else json.dumps(entry)}\n{good}\n")
    (run,) = load_runs([tmp_path])
    assert [s["step"] for s in run.samples] == [1]
    (note,) = run.notes
    assert note.startswith(f"{path}, line 1: not a token sample (")
    with pytest.raises(ValueError, match="line 1: not a token sample .*; remove the line"):
        read_samples(path)


def test_numbers_of_a_sample_that_are_none_are_shown_as_none(tmp_path):
    entry = change_response(advantage=[math.nan, 1.0], policy_shift=[math.inf, 1e308])
    entry["response"]["text"] = ["\ud800", "</script>"]
    write_samples(tmp_path / "capo_tokens.jsonl", [])
    (tmp_path / "capo_tokens.jsonl").write_text(json.dumps(entry) + "\n")
    runs = load_runs([tmp_path])
    assert runs[0].samples[0]["response"]["advantage"] == [None, 1.0]
    assert runs[0].samples[0]["response"]["policy_shift"] == [None, None]
    page = render(group_runs(runs), "title")
    page.encode("utf-8")
    assert '"\\ud800"' in page


# Names


NAMES = ["$\\frac{$", "_run", "<b>&amp;", "\x1b[31mred", "a\nb", "a\u202eb", os.fsdecode(b"a\xff")]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_run_can_be_drawn_and_printed(tmp_path, capfd, name):
    drawing = pytest.importorskip("capo_verl.viewer.drawing")
    for folder in (name, "other"):
        write_entropy(tmp_path / folder / "metrics.jsonl", [1.0, 2.0])
    groups = group_runs(load_runs([tmp_path]))
    legend = drawing.draw(groups, [ENTROPY_PANEL], "steps").legends[0]
    assert {text.get_text() for text in legend.get_texts()} == {visible(name), "other"}
    title = groups[0] if groups[0].label != "other" else groups[1]
    drawing.save_figures([title], "steps", tmp_path / "out")
    ElementTree.parse(tmp_path / "out" / "curves.svg")
    assert main(["report", str(tmp_path / name), "--output", str(tmp_path / "r.html")]) == 0
    assert "<b>" not in (tmp_path / "r.html").read_text().split('id="data">')[1]


def test_what_is_printed_controls_no_terminal(tmp_path, capsys):
    write_entropy(tmp_path / "\x1b[31mred" / "metrics.jsonl", [1.0, math.nan])
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    printed = "".join(capsys.readouterr())
    assert "\x1b" not in printed and printed.count("\\x1b[31mred") == 3


def test_a_path_in_a_refusal_is_one_line_without_control_characters(tmp_path, capsys):
    assert main(["plot", str(tmp_path / "a\x1b[31m\nb")]) == 2
    assert f"{tmp_path}/a\\x1b[31m\\nb: no such file or folder" in capsys.readouterr().err


def test_numbers_in_words():
    assert spans([9, 1, 2, 3, 5, 3]) == "1 to 3, 5, 9"
    assert spans(range(0, 40, 2)) == "0, 2, 4, 6, 8, 10, 12, 14 and 12 more"


# Logs of other writers


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An event file: a head, then entropy 0 to 9 at steps 0 to 9."""
    writer_module = pytest.importorskip("torch.utils.tensorboard")
    folder = tmp_path_factory.mktemp("events")
    writer = writer_module.SummaryWriter(str(folder))
    for step in range(10):
        writer.add_scalar(ENTROPY, float(step), step)
    writer.close()
    return next(folder.iterdir()).read_bytes()


def record_starts(content: bytes) -> list[int]:
    starts = [0]
    while starts[-1] < len(content):
        starts.append(starts[-1] + 16 + struct.unpack_from("<Q", content, starts[-1])[0])
    return starts[:-1]


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda c, at: flip(c, at),  # the length
        lambda c, at: flip(c, at + 9),  # its checksum
        lambda c, at: flip(c, at + 14),  # what it holds
        lambda c, at: c[: at + 5] + c[at + 9 :],
        lambda c, at: c[:at] + bytes(1000) + c[record_starts(c)[6] :],
    ],
)
def test_what_follows_a_damaged_record_of_tensorboard_is_read(tmp_path, events, damage):
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(damage(events, record_starts(events)[5]))  # of step 4
    (run,) = load_runs([tmp_path])
    assert run.series[ENTROPY].at() == {s: float(s) for s in range(10) if s != 4}
    assert run.notes == [f"{path}: damaged and left out: record 6"]


def test_a_record_of_tensorboard_that_is_still_being_written_is_left_out(tmp_path, events):
    (tmp_path / "events.out.tfevents.1").write_bytes(events[:-5])
    (run,) = load_runs([tmp_path])
    assert (run.series[ENTROPY].steps[-1], run.notes) == (8, [])


def wandb_file(values: list[float], parts: int = 1) -> bytes:
    """As wandb writes it: a record each of a run's history."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    content = b":W&B" + bytes(3)
    for step, value in enumerate(values):
        record = pb.Record()
        for key, text in (
            ("_step", str(step)),
            (ENTROPY, json.dumps(value)),
            ("x", f'"{"x" * 9000}"'),
        ):
            record.history.item.add(key=key, value_json=text)
        rest, first = record.SerializeToString(), True
        while rest:
            room = BLOCK - len(content) % BLOCK
            if room < 7:
                content += bytes(room)
                continue
            part, rest = rest[: room - 7], rest[room - 7 :]
            kind = (1 if first else 4) if not rest else (2 if first else 3)
            checksum = zlib.crc32(bytes([kind]) + part)
            content += struct.pack("<IHB", checksum, len(part), kind) + part
            first = False
    return content


def test_what_follows_a_damaged_block_of_wandb_is_read(tmp_path):
    content = wandb_file([float(step) for step in range(10)])
    path = tmp_path / "run-1.wandb"
    path.write_bytes(content)
    assert load_runs([path])[0].series[ENTROPY].at() == {s: float(s) for s in range(10)}
    path.write_bytes(flip(content, 10_000))  # in the second record, of three and a half in a block
    (run,) = load_runs([path])
    assert run.series[ENTROPY].steps == [0, 4, 5, 6, 7, 8, 9]
    assert run.notes == [f"{path}: damaged and left out: record 2"]


def test_wandbs_nan_is_a_gap_and_a_cut_file_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "run-1.wandb"
    path.write_bytes(wandb_file([0.0, math.nan, 2.0, 3.0])[:-100])
    (run,) = load_runs([path])
    assert gaps(run.series[ENTROPY].values) == [1] and run.series[ENTROPY].steps == [0, 1, 2]
    assert len(run.notes) == 1 and "actor/entropy: NaN, infinite" in run.notes[0]


def study(
    folder: Path,
    change_run: Callable[[dict], dict] = dict,
    change_row: Callable[[dict], dict] = dict,
) -> Path:
    """Runs a and b of three evaluations; what changes is of a."""
    pd = pytest.importorskip("pandas")
    runs = [
        {"run_id": i, "method": "grpo", "task": "sort8", "lr": 1e-3, "seed": seed, "config": "{}"}
        for seed, i in enumerate("ab")
    ]
    rows = [{"run_id": i, "step": s, "accuracy": 0.1 * s} for i in "ab" for s in range(3)]
    runs[0] = change_run(runs[0])
    rows[:3] = [change_row(row) for row in rows[:3]]
    pd.DataFrame(runs).to_parquet(folder / "runs.parquet")
    pd.DataFrame(rows).to_parquet(folder / "curves.parquet")
    return folder


@pytest.mark.parametrize(
    ("run", "row", "note"),
    [
        ({"config": "{"}, {}, "runs.parquet, run a: its configuration cannot be read (JSONDecode"),
        ({"config": "[" * 100_000}, {}, "run a: its configuration cannot be read (RecursionError"),
        ({"config": "[1]"}, {}, "run a: its configuration cannot be read (expected a mapping, got"),
        ({}, {"step": 1.5}, "curves.parquet, run a: 3 of 3 rows are left out; the first: its step"),
        ({}, {"step": math.nan}, "curves.parquet, run a: 3 of 3 rows are left out; the first"),
        ({}, {"accuracy": math.inf}, "run a: every value of held-out accuracy is NaN, infinite"),
    ],
)
def test_a_damaged_run_of_a_study_is_named(tmp_path, run, row, note):
    runs = load_runs([study(tmp_path, lambda r: {**r, **run}, lambda r: {**r, **row})])
    assert note in runs[0].notes[0]
    assert runs[1].notes == [] and runs[1].series[ACCURACY].at() == {0: 0.0, 1: 0.1, 2: 0.2}


@pytest.mark.parametrize("name", ["runs.parquet", "curves.parquet"])
def test_a_study_table_that_was_cut_off_is_named(tmp_path, name):
    path = study(tmp_path) / name
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=f"{tmp_path}/runs.parquet: cannot be read as a table"):
        load_runs([tmp_path])


def test_a_study_table_that_is_a_folder_is_named(tmp_path):
    path = study(tmp_path) / "curves.parquet"
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="the other table, curves.parquet, is not beside it"):
        load_runs([tmp_path])


def test_empty_cells_of_a_study_were_not_measured(tmp_path):
    def every_other(row: dict) -> dict:
        return {**row, "kl": 1e-4 if row["step"] % 2 else None}

    run = load_runs([study(tmp_path, change_row=every_other)])[0]
    assert (run.series["capo/kl_mean"].at(), run.notes) == ({1: 1e-4}, [])


def test_a_deep_tree_of_folders_is_looked_through(tmp_path):
    path = tmp_path
    for _ in range(600):
        path = path / "a"
    try:
        os.makedirs(path)
    except OSError:
        pytest.skip("the file system does not have so many levels")
    with pytest.raises(ValueError, match="no log of a run in this folder"):
        load_runs([tmp_path])
    shutil.rmtree(tmp_path / "a")
