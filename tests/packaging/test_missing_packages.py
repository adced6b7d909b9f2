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


RESULTS = ROOT / "capo_verl" / "experiments" / "results"
NOISE = ROOT / "capo_verl" / "experiments" / "study" / "studies" / "noise.yaml"
CASES = {
    "plot": ("matplotlib", ["capo_verl.commands", "plot", RESULTS],
        "capo-verl plot", "viewer"),
    "plot of tables": ("pandas", ["capo_verl.commands", "plot", RESULTS],
        "capo-verl plot", "viewer"),
    "report of tables": ("pyarrow", ["capo_verl.commands", "report", RESULTS],
        "capo-verl report", "viewer"),
    "quickstart, verl": ("verl", ["capo_verl.commands", "quickstart"], "capo-verl quickstart",
        "cpu"),
    "quickstart, Megatron": ("megatron", ["capo_verl.commands", "quickstart"], "capo-verl "
    "quickstart", "cpu"),
    "calibrate": (
        "pandas", ["capo_verl.commands", "calibrate", "--model", "m", "--data", "d.parquet"],
        "capo-verl calibrate", "viewer"
    ),
    "study": ("filelock", ["capo_verl.experiments.study", "status", NOISE],
        "capo_verl.experiments.study", "study"),
    "study, YAML": ("yaml", ["capo_verl.experiments.study", "status", NOISE],
        "capo_verl.experiments.study", "study"),
    "calibration study": ("pandas", ["capo_verl.experiments.calibration", "draw", "x"],
        "capo_verl.experiments.calibration", "study"),
    "evidence": (
        "pandas", ["capo_verl.experiments.study.evidence", RESULTS],
        "capo_verl.experiments.study.evidence", "study"
    ),
    "evaluate": (
        "pyarrow",
        ["capo_verl.commands", "evaluate", "--model", "m", "--data", RESULTS / "runs.parquet",
         "--output", "o"],
        "capo-verl evaluate", "data",
    ),
    "data": (
        "pyarrow",
        ["capo_verl.commands", "data", "reasoning_gym/chain_sum", "--train-size", "2",
         "--test-size", "0", "--output", "o"],
        "capo-verl data", "data",
    ),
    "benchmark": ("matplotlib", ["capo_verl.experiments.benchmark"],
        "capo_verl.experiments.benchmark", "viewer"),
    "plan": ("omegaconf", ["capo_verl.commands", "plan", "Qwen/Qwen2.5-32B"], "capo-verl plan", ""),
}  # fmt: skip
"""What is missing, who is called with what, its name, and the extra that helps."""


@pytest.mark.parametrize("case", CASES)
def test_a_missing_package_is_one_sentence(case, without):
    package, (program, *arguments), name, extra = CASES[case]
    # The experiments are in the checkout only.
    path = {"PYTHONPATH": str(ROOT)} if "experiments" in program else {}
    done = without(package, program, *arguments, **path)
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
def test_data_says_it_for_each_source(package, arguments, sentence, without):
    done = without(package, "capo_verl.commands", "data", *arguments, "--output", "o")
    assert (done.returncode, done.stderr) == (2, f"capo-verl data: {sentence}\n")


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
    assert missing_packages.missing("capo-verl evaluate", error("vllm.engine"), "data") == (
        "capo-verl evaluate needs vllm, which is not installed: pip install vllm"
    )


def test_a_package_of_another_version_is_told_apart():
    found = ImportError("cannot import name 'X' from 'wrapt'", name="wrapt")
    assert missing_packages.missing("capo-verl plan", found, "cpu") == (
        "capo-verl plan cannot use the installed wrapt (cannot import name 'X' from 'wrapt'): pip "
        "install capo-verl"
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
        missing_packages.missing("capo-verl plan", error(name), "cpu")
