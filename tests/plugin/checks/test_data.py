# SPDX-License-Identifier: Apache-2.0
"""Data files of a run: the first bad row is named, and what the run's reward takes is not."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

import pytest

from capo_verl.commands.main import main as capo_verl
from capo_verl.cpu.quickstart.task import TaskConfig, prepare_data
from capo_verl.launch.dry_run import compose, main
from capo_verl.plugin.checks import data
from capo_verl.plugin.checks.before_start import before_start
from tests.launch.launchers import command_line
from tests.plugin.checks.verl_rows import verl_row, write

MATH, GYM = f"pkg://{data.MATH}", f"pkg://{data.GYM}"
FILE = str(Path(data.__file__).parents[2] / "data/rewards/math_answers.py")
OTHER = "/somebody/reward.py"
KEY = "reward.custom_reward_function"


def truth(value):
    return verl_row(reward_model={"style": "rule", "ground_truth": value})


def without(*columns):
    return {key: value for key, value in verl_row().items() if key not in columns}


def asked(*messages):
    return verl_row(prompt=list(messages))


def extra(**keys):
    return verl_row(extra_info={"entry": verl_row()["extra_info"]["entry"], **keys})


def other(**keys):
    """A row that is none of reasoning-gym's."""
    return verl_row(data_source="math", **keys)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine would not get to the end of a file in time."""
    monkeypatch.setattr(data, "SECONDS", 600.0)


def read(rows, tmp_path, *overrides, suffix="parquet"):
    """Problems and notes of a run with these rows as training data, its file being ``FILE``."""
    file = write(rows, tmp_path / f"x.{suffix}")
    found = data.read_data(configured(file, *overrides))
    return tuple([text.replace(str(file), "FILE") for text in texts] for texts in found)


@cache
def composed(*overrides):
    return compose(["model_engine=megatron", "data.train_batch_size=1", *overrides])


def configured(file, *overrides):
    config = copy.deepcopy(composed(*overrides))
    config.data.train_files = config.data.val_files = str(file)
    return config


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize(
    ("reward", "row", "message"),
    [
        # What verl itself reads
        (OTHER, verl_row(prompt="1 + 1 ="), "prompt: '1 + 1 =' is not a list of chat messages"),
        (OTHER, asked(), "prompt: [] is not a list of chat messages"),
        (OTHER, asked({"role": "user", "content": None}), "prompt[0].content: None is not a"),
        (OTHER, asked({"role": "user", "content": " "}), "prompt[0].content: ' ' is not a"),
        (OTHER, asked({"role": None, "content": "x"}), "prompt[0].role: "),
        (OTHER, asked({"role": "human", "content": "x"}), "prompt[0].role: "),
        (OTHER, asked({"from": "human", "value": "x"}), "prompt[0].role: "),
        (OTHER, without("data_source"), "data_source: it is missing"),
        (OTHER, without("reward_model"), "reward_model: None is not an object with ground_truth"),
        (OTHER, verl_row(reward_model={"style": "rule"}), "reward_model: {'style': 'rule'} is not"),
        (OTHER, verl_row(reward_model="2"), "reward_model: '2' is not an object"),
        (OTHER, verl_row(extra_info="x"), "extra_info: 'x' is not an object"),
        # What the rewards of this package need
        (MATH, truth(2), "reward_model.ground_truth: 2 is not a non-empty string"),
        (MATH, truth(2.5), "reward_model.ground_truth: 2.5 is not"),
        (MATH, truth(True), "reward_model.ground_truth: True is not"),
        (MATH, truth(["2"]), "reward_model.ground_truth: ['2'] is not"),
        (MATH, truth({"target": 2}), "reward_model.ground_truth: {'target': 2} is not"),
        (MATH, truth(None), "reward_model.ground_truth: None is not"),
        (MATH, truth(" "), "reward_model.ground_truth: ' ' is not"),
        (GYM, truth(2), "reward_model.ground_truth: 2 is not a non-empty string"),
        (FILE, truth(2), "reward_model.ground_truth: 2 is not a non-empty string"),
        (f"file://{FILE}", truth(2), "reward_model.ground_truth: 2 is not a non-empty string"),
        ("pkg://capo_verl.rewards.math_answers", truth(2), "reward_model.ground_truth: 2 is not"),
        ("pkg://capo_verl/data/gym", truth(2), "reward_model.ground_truth: 2 is not"),
        (MATH, verl_row(data_source=None), "data_source: None is not a non-empty string"),
        (MATH, verl_row(data_source=7), "data_source: 7 is not a non-empty string"),
        (
            MATH,
            extra(answer_format="xml"),
            "extra_info.answer_format: 'xml' is none of boxed, tags",
        ),
        (MATH, verl_row(extra_info={"index": 0}), "extra_info.entry: None is not a reasoning-gym"),
        (GYM, extra(entry=""), "extra_info.entry: '' is not a reasoning-gym entry as JSON"),
        (GYM, extra(entry="[1]"), "extra_info.entry: '[1]' is not a reasoning-gym entry as JSON"),
        (GYM, other(), "data_source: 'math' is not reasoning_gym/GENERATOR"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_a_bad_row_is_named(tmp_path, suffix, reward, row, message):
    problems, _ = read([row, row], tmp_path, f"{KEY}.path={reward}", suffix=suffix)
    assert problems[0].startswith(f"data.train_files=FILE, row 0, {message}")
    assert problems[1].startswith(f"data.val_files=FILE, row 0, {message}")
    assert "correct the row, or prepare the file anew" in problems[0] and "\n" not in problems[0]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize(
    "row",
    [
        truth(None),
        truth(" "),
        verl_row(data_source=None),
        asked({"role": "user", "content": None}),
        extra(answer_format="xml"),
        extra(entry=None),
    ],
    ids=str,
)
def test_the_first_of_the_bad_rows_is_named(tmp_path, suffix, row):
    rows = [verl_row()] * 1500 + [row, verl_row(), truth("")]
    problems, _ = read(rows, tmp_path, f"{KEY}.path={MATH}", suffix=suffix)
    assert problems[0].startswith("data.train_files=FILE, row 1500, ")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
@pytest.mark.parametrize(
    ("overrides", "row"),
    [
        ([], truth(2)),
        ([f"{KEY}.path={OTHER}"], truth(2)),
        ([f"{KEY}.path={OTHER}"], truth({"target": 2, "numbers": [1, 1]})),
        ([f"{KEY}.path={OTHER}"], extra(answer_format="xml")),
        ([f"{KEY}.path={OTHER}"], extra(entry=None)),
        ([], without("extra_info")),
        ([], asked({"role": "user", "content": [{"type": "text", "text": "x"}]})),
        ([], asked({"role": "system", "content": "x"}, {"role": "tool", "content": "x"})),
        (
            ["actor_rollout_ref.model.custom_chat_template=x"],
            asked({"role": "human", "content": "x"}),
        ),
        ([f"{KEY}.path={MATH}"], other(extra_info={"index": 0})),
        ([f"{KEY}.path={MATH}"], other(extra_info=None)),
        ([f"{KEY}.path={MATH}"], extra(answer_format=None)),
        ([f"{KEY}.path={GYM}"], verl_row()),
        (["reward.reward_manager.source=importlib"], without("data_source", "reward_model")),
        (["reward.reward_manager.name=mine"], without("data_source", "reward_model")),
        (["reward.reward_model.enable=True"], without("data_source", "reward_model")),
        (["data.prompt_key=question"], {**without("prompt"), "question": verl_row()["prompt"]}),
        (["data.custom_cls.path=pkg://mine"], verl_row(prompt=None)),
    ],
    ids=str,
)
def test_what_the_run_takes_is_not_refused(tmp_path, suffix, overrides, row):
    assert read([row], tmp_path, *overrides, suffix=suffix)[0] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt"', "cannot be read (line 1: no JSON at character 10: "),
        ("GOOD\n[1]", "cannot be read (line 2: not an object)"),
        ("GOOD\n\nGOOD,", "cannot be read (line 3: no JSON at character "),
        ('{"prompt": 1, "prompt": 2}', "the key 'prompt' is there twice"),
        ('{"question": "x"}', "lacks the column 'prompt' (it has question): prepare it anew, or"),
        ("GOOD\nINTEGER", "row 1, reward_model.ground_truth: 2 is not a non-empty string"),
        ("[GOOD, INTEGER]", "row 1, reward_model.ground_truth: 2 is not a non-empty string"),
        ("GOOD\nNAN", "row 1, reward_model.ground_truth: nan is not a non-empty string"),
        # datasets makes a date of it, if all are
        ("DATE\nDATE", "row 0, reward_model.ground_truth: datetime.datetime(2020, 1, 1, 0, 0) is"),
        ("[DATE]", "row 0, reward_model.ground_truth: datetime.datetime(2020, 1, 1, 0, 0) is"),
        ("", "have 0 prompts, less than one data.train_batch_size=1"),
    ],
    ids=str,
)
def test_json_that_verl_cannot_take(tmp_path, text, message):
    rows = {"GOOD": verl_row(), "INTEGER": truth(2), "NAN": truth(float("nan"))}
    rows["DATE"] = truth("2020-01-01")
    for name, row in rows.items():
        text = text.replace(name, json.dumps(row))
    (tmp_path / "x.jsonl").write_text(text)
    problems, _ = data.read_data(configured(tmp_path / "x.jsonl", f"{KEY}.path={MATH}"))
    assert message in problems[0] and "\n" not in problems[0]


@pytest.mark.parametrize(
    "content",
    ["\ufeffGOOD", "\nGOOD\n\n", "[GOOD,\nGOOD]", "GOOD\r\nGOOD\r\n"],
    ids=repr,
)
def test_json_that_verl_takes(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content.replace("GOOD", json.dumps(verl_row())))
    assert data.read_data(configured(tmp_path / "x.jsonl", f"{KEY}.path={MATH}"))[0] == []


def test_utf_16_is_not_what_verl_reads(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(verl_row()), encoding="utf-16")
    problems, _ = data.read_data(configured(tmp_path / "x.jsonl"))
    assert "x.jsonl cannot be read (JSON parse error: " in problems[0]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_how_many_rows_were_read_is_said(tmp_path, suffix):
    assert read([verl_row()] * 3, tmp_path, suffix=suffix)[1] == [
        "data.train_files=FILE: read 3 of 3 rows",
        "data.val_files=FILE: read 3 of 3 rows",
    ]


@pytest.mark.parametrize(("suffix", "rows"), [("parquet", " of 2500"), ("jsonl", "")])
def test_a_file_that_takes_too_long_is_not_read_to_its_end(tmp_path, monkeypatch, suffix, rows):
    monkeypatch.setattr(data, "SECONDS", -2.0)
    problems, notes = read([verl_row()] * 2500, tmp_path, suffix=suffix)
    assert problems == []
    assert notes[0] == f"data.train_files=FILE: read 1{rows} rows, which is what -1.0 s allow"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pkg://capo_verl.data.rewards.nothing", "compute_score"),
        (MATH, "nothing"),
    ],
)
def test_a_reward_that_is_not_in_this_package_is_refused(tmp_path, path, name):
    with pytest.raises(ValueError, match=f"path={path} has no {name} .*: set path to {MATH}"):
        read([verl_row()], tmp_path, f"{KEY}.path={path}", f"{KEY}.name={name}")


def test_columns_that_nobody_needs_are_not_read(tmp_path):
    file = write([verl_row(solution="x")], tmp_path / "x.parquet")
    total, rows = data._parquet(file, data._needs(configured(file)))
    (row,) = rows
    assert total == 1 and row == {**verl_row(), "extra_info": {"entry": '{"answer": "2"}'}}


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        ([verl_row()] * 8, 0, "train.parquet: read 8 of 8 rows"),
        ([verl_row()] * 7 + [truth(None)], 2, "train.parquet, row 7, reward_model.ground_truth: "),
        ([verl_row()] * 7 + [extra(entry=None)], 2, "train.parquet, row 7, extra_info.entry: None"),
    ],
    ids=["good", "no truth", "no entry"],
)
def test_a_strict_dry_run(tmp_path, tiny_model, monkeypatch, capsys, rows, code, said):
    """Of the quickstart's launcher: the code it exits with, and what it says on one line."""
    _, *overrides = command_line("run_quickstart_cpu.sh", tmp_path, MODEL_PATH=tiny_model)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write(rows, tmp_path / f"data/{split}.parquet")
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setenv("DRY_RUN", "strict")
    assert main([*overrides, "data.train_batch_size=8"]) == code
    printed = capsys.readouterr()
    assert (printed.out == "") == (code == 2)
    (line,) = [line for line in printed.err.splitlines() if said in line]
    assert line.startswith("note: " if code == 0 else "capo_verl: refused before start: ")


def test_the_start_of_a_run_is_refused_as_well(tmp_path, tiny_model, monkeypatch):
    _, *overrides = command_line("run_quickstart_cpu.sh", tmp_path, MODEL_PATH=tiny_model)
    (tmp_path / "data").mkdir()
    for split, last in (("train", verl_row()), ("test", truth(" "))):
        write([verl_row()] * 7 + [last], tmp_path / f"data/{split}.parquet")
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    with pytest.raises(ValueError, match="val_files=.*test.parquet, row 7, .*ground_truth: ' ' is"):
        before_start(compose([*overrides, "data.train_batch_size=8"]))


def test_what_this_package_writes_is_taken(tmp_path):
    pytest.importorskip("reasoning_gym")
    prepared = ["reasoning_gym/rush_hour", "--train-size", "4", "--test-size", "0"]
    assert capo_verl(["data", *prepared, "--output", str(tmp_path)]) == 0
    quickstart, _ = prepare_data(TaskConfig(train_size=4, test_size=4, sft_size=1), tmp_path)
    rush_hour = tmp_path / "reasoning_gym_rush_hour"
    for file in (quickstart / "train.parquet", rush_hour / "train.parquet"):
        for reward in (GYM, MATH):
            assert data.read_data(configured(file, f"{KEY}.path={reward}"))[0] == []
