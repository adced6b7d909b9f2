# SPDX-License-Identifier: Apache-2.0
"""Importing costs nothing, and a package that is not installed is one sentence: who needs it, what
installs it.
"""

from __future__ import annotations

import json

import pytest

from capo_verl.plugin import missing_packages
from tests.packaging.conftest import ROOT
from tests.packaging.test_distributions import project

HEAVY = (
    "torch",
    "numpy",
    "verl",
    "ray",
    "megatron",
    "transformers",
    "matplotlib",
    "pandas",
    "pyarrow",
    "rich",
)
INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize(
    "module",
    ["capo_verl", "capo_verl.config", "capo_verl.commands.main", "capo_verl.plugin.register",
        "capo_verl.plugin.stack", "capo_verl.plugin.hydra_groups",
     "capo_verl.plugin.checks.rivals", "hydra_plugins.capo_verl_search_path"],
)  # fmt: skip
def test_what_every_process_imports_is_light(module, installed):
    done = installed.run(
        "-c", f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_the_filter_brings_torch_alone(installed):
    done = installed.run(
        "-c",
        f"import sys, capo_verl.core; print(*(name for name in {HEAVY} if name in sys.modules))",
    )
    assert done.stdout.split() in (["torch"], ["torch", "numpy"]), (
        done.stderr
    )  # numpy by torch, where it is installed


CASES = {
    "plot": ("matplotlib", ["capo_verl.commands", "plot", ROOT / "docs" / "evidence"],
        "capo-verl plot", "viewer"),
    "plot of tables": ("pandas", ["capo_verl.commands", "plot", ROOT / "docs" / "evidence"],
        "capo-verl plot", "viewer"),
    "report of tables": ("pyarrow", ["capo_verl.commands", "report", ROOT / "docs" / "evidence"],
        "capo-verl report", "viewer"),
    "quickstart, verl": ("verl", ["capo_verl.commands", "quickstart"], "capo-verl quickstart",
        "cpu"),
    "quickstart, Megatron": ("megatron", ["capo_verl.commands", "quickstart"], "capo-verl "
    "quickstart", "cpu"),
    "calibrate": (
        "pandas", ["capo_verl.commands", "calibrate", "--model", "m", "--data", "d.parquet"],
        "capo-verl calibrate", "viewer"
    ),
    "study": ("filelock", ["study.py", "status", ROOT / "capo_verl/experiments/study/studies/noise.yaml"], "study.py", "study"),
    "study, YAML": ("yaml", ["study.py", "status", ROOT / "capo_verl/experiments/study/studies/noise.yaml"], "study.py", "study"),
    "calibration study": ("pandas", ["calibration_study.py", "draw", "x"], "calibration_study.py",
        "study"),
    "evidence": (
        "pandas", ["capo_verl.experiments.study.evidence", ROOT / "docs" / "evidence.md"],
        "capo_verl.experiments.study.evidence", "study"
    ),
    "evaluate": (
        "pyarrow", ["evaluate.py", "--model", "m", "--data", ROOT / "docs/evidence/runs.parquet", "--output", "o"],
        "evaluate.py", "data",
    ),
    "prepare_data": (
        "pyarrow", ["prepare_data.py", "reasoning_gym/chain_sum", "--train-size", "2", "--test-size", "0", "--output", "o"],
        "prepare_data.py", "data",
    ),
    "benchmark": ("matplotlib", ["benchmark_filter.py"], "benchmark_filter.py", "viewer"),
    "plan": ("omegaconf", ["plan.py", "Qwen/Qwen2.5-32B"], "plan.py", ""),
}  # fmt: skip
"""What is missing, who is called with what, its name, and the extra that helps."""


@pytest.mark.parametrize("case", CASES)
def test_a_missing_package_is_one_sentence(case, without, installed):
    package, (program, *arguments), name, extra = CASES[case]
    if program.endswith(".py"):
        program = installed.scripts / program
    done = without(package, program, *arguments)
    remedy = (
        f"'capo-verl[{extra}]'" + (f" {INDEX}" if extra == "cpu" else "") if extra else "capo-verl"
    )
    assert done.stdout == "" and done.returncode in (1, 2)
    assert done.stderr.splitlines()[-1:] == [
        f"{name} needs {package}, which is not installed: pip install {remedy}"
    ]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("package", "arguments", "sentence"),
    [
        (
            "reasoning_gym",
            ["reasoning_gym/chain_sum"],
            "reasoning_gym is missing: pip install 'capo-verl[data]'",
        ),
        (
            "datasets",
            ["math"],
            "datasets is missing: pip install 'capo-verl[data]', or --from FILE",
        ),
    ],
)
def test_prepare_data_says_it_for_each_source(package, arguments, sentence, without, installed):
    done = without(package, installed.scripts / "prepare_data.py", *arguments, "--output", "o")
    assert (done.returncode, done.stderr) == (2, f"prepare_data: {sentence}\n")


def test_the_judge_of_answers_says_it(without):
    done = without("math_verify", "capo_verl.data.rewards.worker", "math")
    assert json.loads(done.stdout) == {"failed": "math_verify is missing"}, done.stderr


def test_reading_a_pretrained_file_says_it(without, tmp_path):
    done = without("gguf", "capo_verl.cpu.smollm2", CAPO_CACHE=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].endswith(": pip install 'capo-verl[smollm2]'")


def test_every_extra_that_is_advised_exists():
    assert set(missing_packages.EXTRAS) <= set(project()["optional-dependencies"])


def error(name: str | None, text: str = "") -> ModuleNotFoundError:
    return ModuleNotFoundError(text or f"No module named {name!r}", name=name)


def test_a_package_of_nobodys_is_named_itself():
    """No extra installs vLLM: verl's own does."""
    assert missing_packages.missing("evaluate.py", error("vllm.engine"), "data") == (
        "evaluate.py needs vllm, which is not installed: pip install vllm"
    )


def test_a_package_of_another_version_is_told_apart():
    found = ImportError("cannot import name 'X' from 'wrapt'", name="wrapt")
    assert missing_packages.missing("plan.py", found, "cpu") == (
        "plan.py cannot use the installed wrapt (cannot import name 'X' from 'wrapt'): pip install "
        "capo-verl"
    )


def test_a_library_that_asks_for_another_keeps_its_words():
    found = ImportError("Please install torch and gguf>=0.10.0\nto load a GGUF checkpoint.")
    assert missing_packages.missing("smollm2", found, "smollm2") == (
        "smollm2: Please install torch and gguf>=0.10.0 to load a GGUF checkpoint: pip install "
        "'capo-verl[smollm2]'"
    )


@pytest.mark.parametrize("name", ["capo_verl.no_such_module", "hydra_plugins.x"])
def test_a_defect_of_this_project_is_no_missing_package(name):
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
        missing_packages.missing("plan.py", error(name), "cpu")
