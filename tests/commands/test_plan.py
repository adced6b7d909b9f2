# SPDX-License-Identifier: Apache-2.0
"""``capo-verl plan``: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest

from capo_verl.commands.main import main
from capo_verl.launch.plan import make_plan
from tests.launch.test_plan import QWEN_7B, RUN


def test_memory_is_the_librarys(capsys):
    assert main(["plan", "Qwen2.5-Math-7B", "--tp", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(make_plan(RUN, QWEN_7B).as_dict()))
    assert printed["parameters"] == 7_615_616_512
    assert main(["plan", "Qwen2.5-Math-7B", "--tp", "2"]) == 0
    table = capsys.readouterr().out
    assert "7.62 B parameters" in table and "CAPO moments" in table
    assert main(["plan", "Qwen2.5-Math-7B", "--tp", "2", "--no-capo"]) == 0
    assert "CAPO" not in capsys.readouterr().out
    sizes = {
        "layers": 28,
        "hidden": 3584,
        "heads": 28,
        "kv-heads": 4,
        "intermediate": 18944,
        "vocab": 152064,
    }
    arguments = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
    assert main(["plan", *arguments, "--tp", "2", "--json"]) == 0
    # Without the biases of queries, keys and values.
    assert (
        json.loads(capsys.readouterr().out)["parameters"] == 7_615_616_512 - 28 * (28 + 2 * 4) * 128
    )


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["no/model"], "no/model is no folder with a config.json and not known: give --layers"),
        (2, [], "name a model"),
        (2, ["--layers", "2"], "--hidden is missing: give all sizes"),
        (2, ["--config", "nowhere.yaml"], "nowhere.yaml"),
        (1, ["Qwen2.5-32B", "--tp", "8", "--rollout-tp", "4"], "does not fit: update needs"),
        (1, ["Qwen3-8B", "--tp", "3"], "8 GPUs do not divide by"),
        (
            1,
            ["Qwen3-8B", "--prompts", "100", "--mini-batch", "256"],
            "--prompts 100 are less than one --mini-batch 256: verl refuses that, or fills it up",
        ),
        (1, ["Qwen3-8B", "--tp", "0"], "tensor_model_parallel_size=0: set it to a positive int"),
    ],
)
def test_what_cannot_be_planned_is_one_line(code, arguments, message, capsys):
    assert main(["plan", *arguments]) == code
    printed, error = capsys.readouterr()
    assert message in error and error.startswith("capo-verl plan: ") and error.count("\n") == 1
    assert printed == ""


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is no YAML: "), ("- a", "holds a list: give what DRY_RUN=1")]
)
def test_a_file_that_no_dry_run_has_printed(text, message, tmp_path, capsys):
    (tmp_path / "resolved.yaml").write_text(text)
    assert main(["plan", "--config", str(tmp_path / "resolved.yaml")]) == 2
    assert message in capsys.readouterr().err
