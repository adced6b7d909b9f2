# SPDX-License-Identifier: Apache-2.0
"""``capo-verl data --from FILE``: what a file of each format becomes, and which line, record and
column it is refused for.
"""

from __future__ import annotations

import codecs
import datetime
import io
import json
from decimal import Decimal

import pytest

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet

from capo_verl.commands.main import main
from capo_verl.data.evaluation.problems import read_problems
from capo_verl.data.rows import check_rows

ASKED = [{"role": "user", "content": "1+1?"}]
MARK = "\ufeff"


def jsonl(*records):
    return ".jsonl", "\n".join(map(json.dumps, records)).encode()


def answers(*values):
    return jsonl(*({"problem": f"q{i}", "answer": value} for i, value in enumerate(values)))


def questions(*values):
    return jsonl(*({"problem": value, "answer": "1"} for value in values))


def csv(text, encoding="utf-8"):
    return ".csv", text.encode(encoding)


def column(values, kind=None, names=("problem", "answer")):
    array = pa.array(values, kind)
    arrays = [pa.array(["q"] * len(array)), *[array] * (len(names) - 1)]
    stream = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays(arrays, names=list(names)), stream)
    return ".parquet", stream.getvalue()


def schema(**changes):
    """A record in verl's schema."""
    return {
        "data_source": "theirs", "prompt": ASKED, "ability": "algebra",
        "reward_model": {"style": "rule", "ground_truth": "5"},
        "extra_info": {"index": 3, "split": "train"}, **changes,
    }  # fmt: skip


def truth(value):
    return schema(reward_model={"style": "rule", "ground_truth": value})


def table(*records):
    stream = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(records)), stream)
    return ".parquet", stream.getvalue()


def prepare(tmp_path, file, *options, name="math500"):
    """Exit code, the file's path, and the rows that were written."""
    path = tmp_path / f"x{file[0]}"
    path.write_bytes(file[1])
    out = tmp_path / "out"
    code = main(["data", name, "--from", str(path), "--output", str(out), *options])
    written = out / name / "test.parquet"
    return code, path, parquet.read_table(written).to_pylist() if written.exists() else None


TAKEN = {
    "numbers": (answers(5, 5.0, 1e22, -0.0, 10**25, 2.5), ["5", "5", "1" + "0" * 22, "0",
        "1" + "0" * 25, "2.5"]),
    "a number that is no float": ((".jsonl", b'{"problem": "q", "answer": 9007199254740993.0}'),
        ["9007199254740993"]),
    "list": (answers(["1", 2]), ["1, 2"]),
    "reward model": (answers({"style": "rule", "ground_truth": "7"}), ["7"]),
    "decimals": (column([Decimal("5.00"), Decimal("2.50")]), ["5", "2.5"]),
    "integers": (column([5, 10**18], pa.int64()), ["5", "1" + "0" * 18]),
    "integers as floats": (column([5.0, 1e22], pa.float64()), ["5", "1" + "0" * 22]),
    "float32": (column([0.1, 27.0], pa.float32()), ["0.1", "27"]),
    "float16": (column([0.1], pa.float16()), ["0.1"]),
    "a dictionary of values": (column(pa.array(["a", "b", "a"]).dictionary_encode()),
        ["a", "b", "a"]),
    "large strings": (column(["a"], pa.large_string()), ["a"]),
    "jsonl with a mark": ((".jsonl", codecs.BOM_UTF8 + answers("1")[1]), ["1"]),
    "jsonl with blank lines": ((".jsonl", b"\n\n" + answers("1")[1] + b"\n \r\n"), ["1"]),
    "jsonl that is a list": ((".jsonl", json.dumps([{"problem": "q", "answer": "1"}],
        indent=1).encode()), ["1"]),
    "json with lines": ((".json", answers("1", "2")[1]), ["1", "2"]),
    "jsonl in UTF-16": ((".jsonl", answers("1")[1].decode().encode("utf-16")), ["1"]),
    "csv": (csv("problem,answer\nq,1\n"), ["1"]),
    "csv with a mark": (csv(f"{MARK}problem,answer\nq,1\n"), ["1"]),
    "csv in UTF-16": (csv("problem,answer\nq,1\n", "utf-16"), ["1"]),
    "csv in big-endian UTF-16": (csv(f"{MARK}problem,answer\nq,1\n", "utf-16-be"), ["1"]),
    "csv in UTF-32": (csv("problem,answer\nq,1\n", "utf-32"), ["1"]),
    "csv of pandas": (csv(",problem,answer\n0,q,1.0\n"), ["1"]),
    "csv with lines in a field": (csv('problem,answer\r\n"a\nb",1\r\n\r\n"c, ""d""",2\r\n'),
        ["1", "2"]),
    "csv with another separator of lines in a field": (csv("problem,answer\na\u2028b\x0cc,1\n"),
        ["1"]),
    "schema": (jsonl(schema(), truth("6")), ["5", "6"]),
    "schema, numbers": (jsonl(truth(5), truth(27.0), truth(["8"])), ["5", "27", "8"]),
    "schema, as it is": (jsonl(truth("$5$")), ["$5$"]),
    "schema in parquet": (table(schema(), truth("6")), ["5", "6"]),
    "empty, but another column has it": (jsonl({"problem": None, "question": "q", "answer": "1"}),
        ["1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TAKEN)
def test_what_a_file_becomes(tmp_path, case):
    file, expected = TAKEN[case]
    code, _, rows = prepare(tmp_path, file)
    assert code == 0
    assert [row["reward_model"]["ground_truth"] for row in rows] == expected
    check_rows(rows, case)


@pytest.mark.parametrize(("case", "asked"), [
    ("csv with lines in a field", ["a\nb", 'c, "d"']),
    ("csv with another separator of lines in a field", ["a\u2028b\x0cc"]),
    ("csv of pandas", ["q"]),
])  # fmt: skip
def test_the_question_in_a_csv(tmp_path, case, asked):
    rows = prepare(tmp_path, TAKEN[case][0])[2]
    assert [row["prompt"][-1]["content"] for row in rows] == asked


REFUSED = {
    # what is no text
    "null": (answers("1", None), "record 1, column answer: no answer, it is empty"),
    "NaN": ((".jsonl", b'{"problem": "q", "answer": NaN}'), "record 0, column answer: no answer"),
    "infinity": ((".jsonl", b'{"problem": "q", "answer": -Infinity}'),
        "record 0, column answer: -inf is not finite"),
    "true": (answers("1", True), "record 1, column answer: True is of type bool"),
    "empty": (answers("1", ""), "record 1, column answer: no answer, it is empty"),
    "blank": (answers("1", " \n"), "record 1, column answer: no answer, it is empty"),
    "no values": (answers("1", []), "record 1, column answer: no answer of the form 'plain'"),
    "lists in a list": (answers([["1"]]), "record 0, column answer[0]: ['1'] is of type list"),
    "null in a list": (answers(["1", None]), "record 0, column answer[1]: it is empty"),
    "object": (answers({"a": 1}), "record 0, column answer: {'a': 1} is of type dict"),
    "object as truth": (answers({"ground_truth": {"target": 1}}),
        "record 0, column answer.ground_truth: {'target': 1} is of type dict"),
    "text of an object": (answers("{'ground_truth': '5'}"),
        "record 0, column answer: \"{'ground_truth': '5'}\" is the text of a list or an object"),
    "bytes": (column([b"5"]), "record 0, column answer: b'5' is of type bytes"),
    "dates": (column([datetime.date(2020, 1, 1)]), "record 0, column answer: datetime.date("),
    "times": (column([datetime.datetime(2020, 1, 1)]), "record 0, column answer: datetime.date"),
    "booleans": (column([True]), "record 0, column answer: True is of type bool"),
    "integers with a null": (column([5, None]), "record 1, column answer: no answer, it is empty"),
    "floats with a NaN": (column([5.0, float("nan")]), "record 1, column answer: no answer"),
    "only nulls": (column([None], pa.null()), "record 0, column answer: no answer, it is empty"),
    "map": (column([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "record 0, column answer[0]: ('a', 1) is of type tuple"),
    # questions
    "list as question": (questions("q", ["a", "b"]), "record 1, column problem: ['a', 'b'] is of"),
    "object as question": (questions({"a": 1}), "record 0, column problem: {'a': 1} is of type"),
    "null as question": (questions("q", None), "record 1, column problem: no question, it is emp"),
    "true as question": (questions(True), "record 0, column problem: True is of type bool"),
    "blank as question": (questions("q", "  "), "record 1, column problem: no question, it is emp"),
    "a message alone": (questions(ASKED[0]), "record 0, column problem: {'role': 'user', 'con"),
    "no messages": (questions([]), "record 0, column problem: [] is of type list"),
    "an answer at the end": (questions([*ASKED, {"role": "assistant", "content": "2"}]),
        "record 0, column problem: the last message is not the user's"),
    "another role": (questions([{"role": "human", "content": "x"}]),
        "record 0, column problem[0].role: {'role': 'human', 'content': 'x'} has no role"),
    "no role": (questions([{"from": "human", "value": "x"}]), "record 0, column problem[0].role: "),
    "no content": (questions([{"role": "user"}]), "record 0, column problem[0].content: None is"),
    "blank content": (questions([{"role": "user", "content": ""}]),
        "record 0, column problem[0].content: '' is not a non-empty string"),
    "parts": (questions([{"role": "user", "content": [{"type": "text", "text": "x"}]}]),
        "record 0, column problem[0].content: [{'type': 'text', 'text': 'x'}] is not a non-empty"),
    "text among messages": (questions([*ASKED, "x"]), "record 0, column problem[1].role: 'x' has"),
    "text of messages": (questions(str(ASKED)), "is the text of a list or an object"),
    # verl's schema
    "schema without truth": (jsonl(schema(), truth(None)),
        "record 1, column reward_model.ground_truth: it is empty"),
    "schema with an object": (jsonl(truth({"target": 5})),
        "record 0, column reward_model.ground_truth: {'target': 5} is of type dict"),
    "schema with several": (jsonl(truth(["5", "6"])),
        "record 0, column reward_model.ground_truth: ['5', '6'] has 2 values: one is expected"),
    "schema without prompt": (jsonl(schema(prompt=None)), "record 0, column prompt: no question"),
    "schema, answered": (jsonl(schema(prompt=[*ASKED, {"role": "assistant", "content": "2"}])),
        "record 0, column prompt: the last message is not the user's"),
    "schema, a source that is none": (jsonl(schema(data_source=7)),
        "row 0, data_source: 7 is not a non-empty string"),
    "schema, unknown format": (jsonl(schema(extra_info={"answer_format": "xml"})),
        "row 0, extra_info.answer_format: 'xml' is none of boxed, tags, plain"),
    "schema, no entry": (jsonl(schema(data_source="reasoning_gym/chain_sum")),
        "row 0, extra_info.entry: '' is not a reasoning-gym entry as JSON"),
    "schema, extra_info that is none": (jsonl(schema(extra_info=[1])),
        "record 0, column extra_info: [1] is not an object"),
    "schema, a split that is none": (jsonl(schema(extra_info={"split": 1})),
        "row 0, extra_info.split: 1 is not of type str"),
    "schema, a key of two types": (jsonl(schema(extra_info={"x": "a"}), schema(),
        schema(extra_info={"x": 1})), "row 2: a key of extra_info or of a message has another"),
    # files
    "csv, too many fields": (csv("problem,answer\nq,1\nq,1,2\n"), "x.csv, line 3: 3 fields, but the"
        " header names 2 columns (problem, answer)"),
    "csv, too few fields": (csv('problem,answer\n"a\nb",1\nq\n'), "x.csv, line 4: 1 fields, but"),
    "csv, a column twice": (csv("problem,answer,answer\nq,1,2\n"), "line 1: the column 'answer' is "
        "there twice"),
    "csv, an open quote": (csv('problem,answer\n"q,1\nr,2\n'), "x.csv, line 2: unexpected end"),
    "csv, text behind a quote": (csv('problem,answer\n"q"r,1\n'), "x.csv, line 2: "),
    "csv, a long field": (csv(f"problem,answer\n{'q' * 200_000},1\n"), "line 2: field larger than"),
    "csv, an empty cell": (csv("problem,answer\nq,\n"), "record 0, column answer: no answer, it"),
    "csv, nothing": (csv("problem,answer\n"), "x.csv): no rows"),
    "csv in Latin-1": (csv("problem,answer\n\xe9,1\n", "latin-1"), "x.csv, line 2: 'utf-8' codec"),
    "csv in UTF-16 without a mark": (csv("problem,answer\nq,1\n", "utf-16-le"), "x.csv, line 1: a "
        "NUL character: save it as UTF-8"),
    "parquet, a column twice": (column(["1"], names=("problem", "answer", "answer")),
        "x.parquet: the column 'answer' is there twice"),
    "json, a key twice": ((".jsonl", b'{"problem": "q", "answer": "1", "answer": "2"}'),
        "x.jsonl, line 1: the key 'answer' is there twice"),
    "json, cut off": ((".jsonl", answers("1")[1] + b'\n\n{"problem'), "x.jsonl, line 3: no JSON at "
        "character 2"),
    "json, other things in a list": ((".json", b'[{"problem": "q", "answer": "1"}, 3]'),
        "x.json: not a list of objects: number 1 is 3"),
    "json, deep": ((".json", b'{"problem": ' + b"[" * 200_000), "x.json: maximum recursion depth"),
    "json, half a character": ((".jsonl", b'{"problem": "q\\ud800", "answer": "1"}'),
        "record 0, column problem: 'q\\ud800' is no valid text"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, capsys, case):
    file, message = REFUSED[case]
    code, path, rows = prepare(tmp_path, file)
    error = capsys.readouterr().err
    assert (code, rows) == (2, None)
    assert error.startswith("capo-verl data: ") and error.count("\n") == 1
    assert message in error and str(path) in error


@pytest.mark.parametrize(("answer", "form", "expected"), [
    ("x\n#### 5\nextra", "hashes", "5"),
    ("#### (1,2)", "hashes", "(1,2)"),
    (["\\boxed{1}", "\\boxed{2}"], "boxed", "1, 2"),
])  # fmt: skip
def test_forms(tmp_path, answer, form, expected):
    code, _, (row,) = prepare(tmp_path, answers(answer), "--answer-form", form)
    assert code == 0 and row["reward_model"]["ground_truth"] == expected


@pytest.mark.parametrize("template", ["qwen-math", "tags"])
def test_messages_are_the_prompt_as_they_are(tmp_path, template):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 1+1? "},
        {"role": "assistant", "content": "2", "name": "a"},
        {"role": "user", "content": "And 2+2?"},
    ]
    _, _, (row,) = prepare(tmp_path, questions(messages), "--template", template)
    kept = [{key: v for key, v in message.items() if v is not None} for message in row["prompt"]]
    assert kept == messages
    assert row["extra_info"]["answer_format"] == {"qwen-math": "boxed", "tags": "tags"}[template]


@pytest.mark.parametrize("name", ["math500", "mine"])
@pytest.mark.parametrize("make", [jsonl, table])
@pytest.mark.parametrize(("changes", "kept"), [
    ({}, {"index": 3, "split": "train", "answer_format": "boxed", "id": "", "entry": ""}),
    ({"extra_info": {"index": 0, "id": "a", "answer_format": "tags", "level": 5}},
        {"index": 0, "split": "test", "answer_format": "tags", "id": "a", "entry": "", "level": 5}),
    ({"extra_info": {"index": "9a9b-4f"}},
        {"index": 0, "split": "test", "answer_format": "boxed", "id": "9a9b-4f", "entry": ""}),
    ({"extra_info": None},
        {"index": 0, "split": "test", "answer_format": "boxed", "id": "", "entry": ""}),
], ids=["ours", "more", "a name as index", "none"])  # fmt: skip
def test_a_record_in_verls_schema_is_kept(tmp_path, name, make, changes, kept):
    options = [] if name == "math500" else ["--split", "test"]
    code, _, (row,) = prepare(tmp_path, make(schema(**changes)), *options, name=name)
    assert code == 0
    assert row == {**schema(), "extra_info": kept}


def test_empty_objects_of_extra_info_are_left_out(tmp_path):
    file = jsonl(schema(extra_info={"index": 1, "tools_kwargs": {}, "note": None}))
    extra = prepare(tmp_path, file)[2][0]["extra_info"]
    assert (
        extra.keys() == {"index", "split", "answer_format", "id", "entry"} and extra["index"] == 1
    )


@pytest.mark.parametrize(("record", "source", "asked"), [
    ({"prompt": "q", "answer": "1"}, "HuggingFaceH4/MATH-500", "q"),
    ({"problem": "p", **schema()}, "HuggingFaceH4/MATH-500", "p"),
    (schema(prompt="q"), "theirs", "q"),
    (schema(data_source=None), "HuggingFaceH4/MATH-500", "1+1?"),
], ids=["prompt only", "two questions", "a prompt that is text", "no source"])  # fmt: skip
def test_a_record_that_is_partly_in_verls_schema(tmp_path, record, source, asked):
    (row,) = prepare(tmp_path, jsonl(record))[2]
    assert (row["data_source"], row["prompt"][-1]["content"]) == (source, asked)


@pytest.mark.parametrize(("options", "message"), [
    ([], "record 0: no question in column prompt or problem or question; it has A, Q"),
    (
        ["--question-column", "Q"],
        "record 0: no answer in column reward_model or answer; it has A, Q",
    ),
])  # fmt: skip
def test_columns_of_a_file_that_is_not_in_verls_schema(tmp_path, capsys, options, message):
    file = jsonl({"Q": "q", "A": "1"})
    assert prepare(tmp_path, file, "--split", "test", *options, name="mine")[0] == 2
    assert message in capsys.readouterr().err


def test_columns_of_the_usual_names_need_no_option(tmp_path):
    file = jsonl({"question": "1+1?", "answer": "2"})
    code, _, (row,) = prepare(tmp_path, file, "--split", "test", name="mine")
    assert code == 0
    assert "1+1?" in row["prompt"][-1]["content"]
    assert row["reward_model"]["ground_truth"] == "2"


def test_context_and_messages(tmp_path, capsys):
    file = jsonl({"question": ASKED, "context": "A game.", "final_answer": "1"})
    assert prepare(tmp_path, file, name="olympiadbench")[0] == 2
    assert "a list of messages has no room for the column context" in capsys.readouterr().err


@pytest.mark.parametrize("context", [None, "", " ", float("nan")], ids=repr)
def test_an_empty_context_is_none(tmp_path, context):
    file = jsonl({"question": "q", "context": context, "final_answer": "1"})
    (row,) = prepare(tmp_path, file, name="olympiadbench")[2]
    assert row["prompt"][-1]["content"] == "q"


@pytest.mark.parametrize(("identity", "text"), [
    (60, "60"), (60.0, "60"), ("a", "a"), (None, ""), (float("nan"), ""), ({"$oid": "a"}, ""),
], ids=repr)  # fmt: skip
def test_the_name_of_a_record(tmp_path, identity, text):
    (row,) = prepare(tmp_path, jsonl({"problem": "q", "answer": "1", "id": identity}))[2]
    assert row["extra_info"]["id"] == text


def test_folders_are_no_columns(tmp_path):
    folder = tmp_path / "answer=7"
    folder.mkdir()
    assert prepare(folder, column(["5"]))[2][0]["reward_model"]["ground_truth"] == "5"


@pytest.mark.parametrize(("record", "message"), [
    (truth(None), "row 0, reward_model.ground_truth: it is empty"),
    (truth({"a": 1}), "row 0, reward_model.ground_truth: {'a': 1} is of type dict"),
    (truth(True), "row 0, reward_model.ground_truth: True is of type bool"),
    (schema(data_source=None), "row 0, data_source: it is empty"),
    (schema(prompt="q"), "row 0, prompt: 'q' is not a list of chat messages"),
    (schema(prompt=[{"role": "user", "content": ["x"]}]), "row 0, prompt[0].content: ['x'] is not"),
], ids=str)  # fmt: skip
def test_problems_to_be_evaluated_have_text(tmp_path, record, message):
    (tmp_path / "x.jsonl").write_bytes(jsonl(record)[1])
    with pytest.raises(ValueError) as error:
        read_problems([str(tmp_path / "x.jsonl")])
    assert message in str(error.value)


@pytest.mark.parametrize(("value", "text"), [("5", "5"), (5, "5"), (27.0, "27"), ("", "")])
def test_the_truth_of_a_problem_to_be_evaluated(tmp_path, value, text):
    (tmp_path / "x.jsonl").write_bytes(jsonl(truth(value))[1])
    assert read_problems([str(tmp_path / "x.jsonl")])[0].ground_truth == text


def test_a_folder_with_a_split_in_two_formats(tmp_path, capsys):
    (tmp_path / "test.jsonl").write_bytes(answers("1")[1])
    (tmp_path / "test.csv").write_text("problem,answer\nq,2\n")
    out = tmp_path / "out"
    assert main(["data", "math500", "--from", str(tmp_path), "--output", str(out)]) == 2
    assert "test.jsonl and test.csv are there: remove all but one" in capsys.readouterr().err
    assert not out.exists()
