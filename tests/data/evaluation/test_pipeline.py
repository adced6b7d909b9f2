# SPDX-License-Identifier: Apache-2.0
"""All of ``capo-verl evaluate`` but the servers: what it finds, keeps, scores, reports and
refuses.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("math_verify")

from capo_verl.commands.main import main as capo_verl
from capo_verl.data.evaluation.completions import Completion, Store
from capo_verl.data.evaluation.model_folder import find_model
from capo_verl.data.evaluation.problems import read_problems
from capo_verl.data.evaluation.scoring import per_problem
from capo_verl.data.prepare import write_parquet
from capo_verl.data.rows import make_row
from capo_verl.data.templates import TEMPLATES


def main(arguments: list[str]) -> int:
    return capo_verl(["evaluate", *arguments])


def hf_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-00001-of-00002.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


@pytest.mark.parametrize("inside", ["actor/huggingface", "actor/model/huggingface"])
def test_checkpoints(tmp_path, inside):
    run = tmp_path / "run"
    hf_folder(run / "global_step_10")
    model = hf_folder(run / "global_step_20" / inside)
    (run / "latest_checkpointed_iteration.txt").write_text("20\n")
    assert (
        find_model(str(run))
        == find_model(str(run / "global_step_20"))
        == find_model(str(model))
        == str(model)
    )
    assert find_model(str(run / "global_step_10")) == str(run / "global_step_10")
    assert find_model("Qwen/Qwen2.5-Math-7B") == "Qwen/Qwen2.5-Math-7B"


@pytest.mark.parametrize(
    ("file", "backend"), [("dist_ckpt/x", "megatron"), ("model_world_size_2_rank_0.pt", "fsdp")]
)
def test_a_checkpoint_without_hugging_face_weights_says_how_to_get_them(tmp_path, file, backend):
    actor = tmp_path / "global_step_5/actor"
    (actor / file).parent.mkdir(parents=True)
    (actor / file).write_text("")
    (actor / "huggingface").mkdir()
    (actor / "huggingface/config.json").write_text(
        "{}"
    )  # verl keeps config and tokenizer there in any case
    with pytest.raises(ValueError) as error:
        find_model(str(tmp_path / "global_step_5"))
    assert "save_contents=[model,optimizer,extra,hf_model]" in str(error.value)
    assert (
        f"verl.model_merger merge --backend {backend} --local_dir {actor} --target_dir "
        f"{actor}/huggingface" in str(error.value)
    )


def test_no_checkpoint_at_all(tmp_path):
    for path, message in (
        (tmp_path, "neither config.json"),
        (tmp_path / "no", "no such folder"),
        (Path(__file__), "a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            find_model(str(path))


def problem_file(path: Path, source: str, count: int) -> Path:
    rows = [
        make_row(
            source,
            f"{source}: {i}+{i}?",
            TEMPLATES["boxed"],
            str(2 * i),
            "math",
            index=i,
            split="t",
        )
        for i in range(count)
    ]
    write_parquet(rows, path)
    return path


def test_problems(tmp_path):
    file = problem_file(tmp_path / "a.parquet", "a", 4)
    problems = read_problems([str(file), str(file)])
    assert [p.ground_truth for p in problems] == [
        "0",
        "2",
        "4",
        "6",
    ]  # those of the second file are the same
    assert (
        problems[1].prompt[0]["role"] == "user"
        and problems[1].extra_info["answer_format"] == "boxed"
    )
    assert [p.key for p in read_problems([str(file)], limit=2)] == [p.key for p in problems[:2]]
    (tmp_path / "bad.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": "x"}], "data_source": "s"}\n'
    )
    with pytest.raises(
        ValueError,
        match=r"bad.jsonl, row 0: not a row of verl's schema \(KeyError: 'reward_model'\)",
    ):
        read_problems([str(tmp_path / "bad.jsonl")])


SETTINGS = {"model": "m", "n": 2, "temperature": 1.0}


def test_store_goes_on_after_a_kill(tmp_path):
    store = Store(tmp_path / "out", SETTINGS)
    completions = [Completion("k", i, f"text {i} \ud800 \x00\n", 5, False) for i in range(3)]
    store.add(completions)
    store.close()
    content = store.path.read_bytes()
    store.path.write_bytes(content[:-10])
    again = Store(tmp_path / "out", SETTINGS)
    assert list(again.read().values()) == completions[:2]
    again.add(completions[2:])
    again.close()
    assert store.path.read_bytes() == content


def test_store_refuses_other_settings_and_damage(tmp_path):
    store = Store(tmp_path, SETTINGS)
    with pytest.raises(
        ValueError,
        match=r"made with temperature=1.0 \(now 0.6\): choose another --output, or --overwrite",
    ):
        Store(tmp_path, {**SETTINGS, "temperature": 0.6})
    store.path.write_text('{"key": 1}\nx\n')
    with pytest.raises(ValueError, match="completions.jsonl, line 1: "):
        store.read()
    with pytest.raises(ValueError, match="--score-only: .* is not there"):
        Store(tmp_path / "other", None)


@pytest.fixture
def evaluated(tmp_path) -> tuple[list[str], Path]:
    """Four completions for each of three and two problems: right 0, 1, 4 times, and 2, 0 times."""
    files = [
        problem_file(tmp_path / f"{name}.parquet", name, count)
        for name, count in (("a", 3), ("b", 2))
    ]
    store = Store(tmp_path / "out", {**SETTINGS, "n": 4})
    for problem, right in zip(read_problems([str(f) for f in files]), (0, 1, 4, 2, 0), strict=True):
        texts = [f"\\boxed{{{problem.ground_truth}.0}}"] * right + [
            "no idea",
            "\\boxed{77}",
            "\\boxed{78}",
            "\\boxed{77}",
        ]
        store.add(
            Completion(problem.key, i, text, 10 + i, i == 3) for i, text in enumerate(texts[:4])
        )
    store.close()
    return [str(file) for file in files], tmp_path / "out"


def test_score_only(evaluated, capsys):
    files, output = evaluated
    assert main(["--data", *files, "--output", str(output), "--score-only"]) == 0
    results = json.loads((output / "results.json").read_text())
    a, b, average = (results["results"][group] for group in ("a", "b", "average"))
    assert a["avg@4"]["mean"] == pytest.approx((0 + 1 / 4 + 1) / 3)
    assert a["pass@1"]["mean"] == pytest.approx((0 + 1 / 4 + 1) / 3)
    assert a["pass@2"]["mean"] == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert a["pass@4"]["mean"] == pytest.approx(2 / 3)
    assert a["maj@4"]["mean"] == pytest.approx(
        (0 + 1 / 3 + 1) / 3
    )  # the second: 2.0, 77 and 78 have one vote each
    assert a["answered"]["mean"] == pytest.approx((3 / 4 + 3 / 4 + 1) / 3)
    assert a["truncated"]["mean"] == pytest.approx(1 / 4) and a["tokens"]["mean"] == pytest.approx(
        11.5
    )
    assert a["avg@4"]["low"] <= a["avg@4"]["mean"] <= a["avg@4"]["high"]
    assert b["avg@4"]["mean"] == pytest.approx(1 / 4)
    assert average["avg@4"]["mean"] == pytest.approx((5 / 12 + 1 / 4) / 2)
    assert results["problems"] == {"a": 3, "b": 2}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["data", "source", "problems", "avg@4", "pass@2", "pass@4", "maj@4"]
    assert lines[1].startswith("a            3         41.7 [0.0, 100.0]")
    import pyarrow.parquet as parquet

    rows = parquet.read_table(output / "scored.parquet").to_pylist()
    assert len(rows) == 20 and sum(row["acc"] for row in rows) == 7


def test_another_reward_function(evaluated, tmp_path):
    files, output = evaluated
    (tmp_path / "reward.py").write_text(
        "def length(data_source, solution_str, ground_truth, extra_info=None):\n    return 1\n"
    )
    arguments = [
        "--data",
        *files,
        "--output",
        str(output),
        "--score-only",
        "--reward-name",
        "length",
        "--k",
        "3",
    ]
    assert main([*arguments, "--reward", str(tmp_path / "reward.py")]) == 0
    results = json.loads((output / "results.json").read_text())["results"]
    assert (
        results["a"]["avg@4"]["mean"] == 1.0
        and "maj@4" not in results["a"]
        and "pass@2" not in results["a"]
    )
    assert results["a"]["pass@3"] == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_different_numbers_of_samples():
    scored = [
        {"key": key, "data_source": "a", "sample": i, "acc": 1.0}
        for key, n in (("x", 1), ("y", 2))
        for i in range(n)
    ]
    with pytest.raises(ValueError, match="problems have 1 to 2 completions"):
        per_problem(scored)


BAD = {
    "no model": ([], "--model is missing"),
    "no such model": (["--model", "/nowhere"], "--model /nowhere: no such folder"),
    "greedy": (["--model", "M", "--temperature", "0", "-n", "2"], "--temperature 0 with -n 2"),
    "k": (
        ["--model", "M", "--k", "8", "-n", "4"],
        "--k 8: pass@k needs at least k completions, -n is 4",
    ),
    "n": (["--model", "M", "-n", "0"], "-n 0: at least one completion"),
    "both": (
        ["--score-only", "--overwrite"],
        "--score-only scores what is there, --overwrite removes it",
    ),
    "nothing to score": (["--score-only"], "run once without --score-only"),
    "backend": (["--model", "M", "--backend", "hf"], "hf is the server for VERL_PLATFORM=cpu"),
    "no GPU": (["--model", "M", "--gpus", "0"], "no GPU was found"),
    "tp": (
        ["--model", "M", "--gpus", "3", "--tp", "2"],
        "--gpus 3 x --nodes 1 does not divide into servers of --tp 2",
    ),
    "override": (
        ["--model", "M", "--gpus", "1", "actor_rollout_ref.rollout.no_such_key=1"],
        "verl's config refuses",
    ),
    "overrides apart": (
        ["data.seed=1", "--model", "M", "actor_rollout_ref.none=1", "--gpus", "1"],
        "refuses data.seed=1 actor_rollout_ref.none=1",
    ),
    "tokenizer": (["--model", "M", "--gpus", "1"], "--model "),
    "reward": (
        ["--model", "M", "--reward", "/no.py"],
        "--reward /no.py --reward-name compute_score: ",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, case, monkeypatch):
    pytest.importorskip("verl")
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    model = hf_folder(tmp_path / "model")
    file = problem_file(tmp_path / "a.parquet", "a", 2)
    arguments, message = BAD[case]
    arguments = [str(model) if argument == "M" else argument for argument in arguments]
    capsys.readouterr()
    assert main([*arguments, "--data", str(file), "--output", str(tmp_path / "out")]) == 2
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.startswith("capo-verl evaluate: ")
    ]
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_missing_data(tmp_path, capsys):
    assert main(["--model", "m/m", "--data", "/no.parquet", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "capo-verl evaluate: --data /no.parquet: no such file\n"


def test_overwrite_removes_evaluations_only(tmp_path):
    from capo_verl.data.evaluation.pipeline import _remove

    store = Store(tmp_path / "out", SETTINGS)
    store.add([Completion("k", 0, "t", 1, False)])
    store.close()
    (tmp_path / "out/thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds more than an evaluation \(thesis.tex\)"):
        _remove(tmp_path / "out")
    (tmp_path / "out/thesis.tex").unlink()
    _remove(tmp_path / "out")
    assert not (tmp_path / "out").exists()
