# SPDX-License-Identifier: Apache-2.0
"""Which stack is installed: verdicts on faked metadata, on this environment, in an empty one; and
the version shims.
"""

from __future__ import annotations

import enum
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType, SimpleNamespace

import packaging
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from capo_verl.plugin import compat, stack

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "check_stack.py"

RIGHT = {
    "hydra-core": "1.3.8", "omegaconf": "2.3.1", "packaging": "25.0", "rich": "15.0.0",
    "wrapt": "2.5.2", "torch": "2.11.0+cu130",
    "megatron-core": "0.18.0", "megatron-bridge": "0.5.2", "mbridge": "0.15.1",
    "transformer-engine": "2.9.0",
    "flash-attn": "2.8.3", "nvidia-modelopt": "0.44.0", "triton": "3.6.0", "transformers": "5.9.0",
    "vllm": "0.24.0", "tensordict": "0.10.0", "ray": "2.60.0", "TransferQueue": "0.1.11",
}  # fmt: skip
"""A complete GPU stack, but for verl, whose version only pyproject.toml knows."""


def pin(name: str) -> str:
    """The version that the CPU stack asks for."""
    return next(iter(stack.wanted(compat.CPU)[1][name].specifier)).version


def gpu_report(python: str = "3.12.1", **changed: str | None) -> stack.Report:
    installed = {
        **RIGHT,
        "verl": pin("verl"),
        **{name.replace("_", "-"): version for name, version in changed.items()},
    }
    return stack.check(compat.GPU, installed.get, python)


def test_complete_stack():
    report = gpu_report()
    assert report.complete and report.problems == [] and report.install == ()
    assert {finding.name: finding.found for finding in report.packages}["torch"] == "2.11.0+cu130"


@pytest.mark.parametrize(
    ("name", "found", "status"),
    [
        ("torch", "2.13.0", "wrong"),
        ("torch", "2.11.0a0+git1", "wrong"),  # a container's build of its own
        ("megatron_core", "0.17.1", "wrong"),
        ("megatron_core", "0.18.0", "ok"),
        ("megatron_core", "0.19.2", "ok"),
        ("megatron_core", "0.20.0", "wrong"),
        ("megatron_bridge", None, "missing"),
        ("tensordict", "0.9.0", "wrong"),
        ("tensordict", "0.8.3", "ok"),
        ("ray", "2.61.0rc1", "ok"),  # a release candidate of something newer
        ("triton", "3.6.0a0", "ok"),
        ("mbridge", "git-main", "wrong"),  # not a version
        ("verl", "0.9.0", "wrong"),
    ],
)
def test_one_package_decides(name: str, found: str | None, status: str):
    report = gpu_report(**{name: found})
    finding = next(f for f in report.packages if f.name == name.replace("_", "-"))
    assert (finding.found, finding.status) == (found, status)
    assert report.complete == (status == "ok")
    assert report.problems == ([] if status == "ok" else [finding])
    if status != "ok":
        assert report.install[0] == f"missing or wrong: '{finding.name}{finding.wanted}'"
        assert (
            report.install[1]
            == f"in a checkout of verl=={pin('verl')}: uv sync --extra megatron --extra vllm"
        )


@pytest.mark.parametrize(
    ("python", "status"), [("3.11.7", "wrong"), ("3.12.11", "ok"), ("3.13.0", "wrong")]
)
def test_python_decides_too(python: str, status: str):
    report = gpu_report(python)
    assert report.python.status == status and report.complete == (status == "ok")
    assert report.install == (() if status == "ok" else ("use Python >=3.12,<3.13",))


def admitted(specifier: stack.SpecifierSet) -> str:
    """A version that a requirement admits: one of those that it names."""
    named = sorted(bound.version.removesuffix(".*") for bound in specifier)
    return next(version for version in named if version in specifier)


def test_cpu_pins_are_the_projects_own(monkeypatch):
    """The same requirements from the installed metadata as from pyproject.toml, and each pin is
    compared exactly.
    """
    python, from_metadata = stack.wanted(compat.CPU)

    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    python_in_checkout, from_checkout = stack.wanted(compat.CPU)
    assert stack.SpecifierSet(python) == stack.SpecifierSet(python_in_checkout)
    pins = {
        name: str(r.specifier)
        for name, r in from_checkout.items()
        if str(r.specifier).startswith("==")
    }
    assert pins == {
        name: str(r.specifier)
        for name, r in from_metadata.items()
        if str(r.specifier).startswith("==")
    }
    assert {"torch", "verl", "megatron-core", "mbridge", "transformers", "ray"} <= pins.keys()

    right = {r.name: admitted(r.specifier) for r in from_checkout.values()}
    right.update(
        {r.name: "99" for r in from_checkout.values() if str(r.specifier).startswith(">=")}
    )
    right.update({"hydra-core": "1.3.0", "omegaconf": "2.3.0", "wrapt": "2.0.0"})
    report = stack.check(compat.CPU, right.get, "3.11.7")
    assert report.complete, report.problems
    report = stack.check(
        compat.CPU, {**right, "ray": None, "megatron-core": "0.19.2"}.get, "3.11.7"
    )
    assert {f.name: f.status for f in report.problems} == {
        "megatron-core": "wrong",
        "ray": "missing",
    }
    assert report.install == (
        "pip install --extra-index-url https://download.pytorch.org/whl/cpu "
        f"'megatron-core{pins['megatron-core']}' 'ray[default]{pins['ray']}'",
    )


def test_gpu_pins_are_verls():
    """What verl's extras say about a package of ours, ours say too; megatron-core is left open
    there.
    """
    wanted = stack.wanted(compat.GPU)[1]
    verls: dict[str, set[str]] = {}
    for requirement in map(Requirement, importlib.metadata.requires("verl") or []):
        extras = ("megatron", "vllm", "verl-core", "flash-attn-cu130torch211")
        if requirement.marker and any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            verls.setdefault(canonicalize_name(requirement.name), set()).add(
                str(requirement.specifier)
            )
    compared = {name for name in wanted if verls.get(name, {""}) - {""}} - {"packaging"}
    assert compared == {"torch", "megatron-bridge", "flash-attn", "nvidia-modelopt", "transformers",
        "vllm", "tensordict",
                        "ray", "transferqueue"}  # fmt: skip
    for name in compared:
        assert verls[name] - {""} == {str(wanted[name].specifier)}, name


def test_no_stack_contradicts_the_dependencies_of_the_project():
    base = {canonicalize_name(r.name): r.specifier for r in stack.declared("")[1]}
    for name in ("cpu", "gpu"):
        requirements = stack.wanted(compat.STACKS[name])[1]
        pinned = {
            n: next(iter(r.specifier)).version
            for n, r in requirements.items()
            if str(r.specifier)[:2] == "=="
        }
        assert "torch" in pinned
        for package in pinned.keys() & base.keys():
            assert base[package].contains(pinned[package]), (name, package)


def run_script(
    *arguments: str, python: str = sys.executable, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [python, str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


# scripts/test_gpu_stack.sh runs these tests, too.
IN_THE_CPU_STACK = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch's CUDA build is no part of the CPU stack"
)


@IN_THE_CPU_STACK
def test_here_the_cpu_stack_is_complete():
    result = run_script("--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["installed"] == ["cpu"]
    cpu, gpu = report["stacks"]
    assert (cpu["stack"], cpu["complete"], cpu["install"]) == ("cpu", True, [])
    assert (gpu["stack"], gpu["complete"]) == ("gpu", False)
    packages = {package["name"]: package for package in cpu["packages"]}
    for name in ("torch", "verl", "megatron-core"):
        found = importlib.metadata.version(name)
        assert packages[name] == {
            "name": name,
            "wanted": f"=={found.partition('+')[0]}",
            "found": found,
            "status": "ok",
        }
    assert (
        cpu["python"]["found"] == ".".join(map(str, sys.version_info[:3]))
        and cpu["python"]["status"] == "ok"
    )
    vllm = next(package for package in gpu["packages"] if package["name"] == "vllm")
    assert vllm == {"name": "vllm", "wanted": "==0.24.0", "found": None, "status": "missing"}

    text = run_script()
    assert text.returncode == 0 and text.stdout.startswith("CPU stack: complete\n")
    assert (
        "GPU stack: not installed, " in text.stdout
        and "(check_stack.py --stack gpu lists them)" in text.stdout
    )
    only_gpu = run_script("--stack", "gpu")
    assert (
        only_gpu.returncode == 1
        and "==0.24.0" in only_gpu.stdout
        and "CPU stack" not in only_gpu.stdout
    )


def fake_distribution(folder: Path, name: str, version: str, requires: str = "") -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requires}"] * bool(requires)
    (info / "METADATA").write_text("\n".join(lines) + "\n")


NCCL = "nvidia-nccl-cu13==2.28.9; platform_system == "
HERE, ELSEWHERE = f"{NCCL}'{platform.system()}'", f"{NCCL}'Elsewhere'"


@pytest.mark.parametrize(
    ("packages", "version_py", "found"),
    [
        ({"torch": ("2.13.0+cpu", "")}, "", "cpu"),
        ({"torch": ("2.13.0", ELSEWHERE)}, "", "cpu"),
        ({"torch": ("2.8.0+rocm6.4", "")}, "", "cpu"),
        ({"torch": ("2.11.0+cu130", "")}, "", "gpu"),
        ({"torch": ("2.11.0", HERE)}, "", "gpu"),
        ({"torch": ("2.8.0a0+5228986c39.nv25.5", "")}, "cuda: Optional[str] = '12.9'", "gpu"),
        ({"torch": ("2.11.0", HERE)}, "cuda: Optional[str] = None", "cpu"),
        ({"torch": ("2.13.0+cpu", ""), "vllm": ("0.28.0+cpu", HERE)}, "", "cpu"),
        ({"torch": ("2.13.0+cpu", ""), "vllm": ("0.24.0", "flashinfer-python")}, "", "gpu"),
        ({"torch": ("2.13.0+cpu", ""), "megatron-bridge": ("0.5.1", "")}, "", "gpu"),
    ],
    ids=str,
)
def test_the_stack_that_is_here(packages, version_py, found, tmp_path, monkeypatch):
    for name, (version, requires) in packages.items():
        fake_distribution(tmp_path, name, version, requires)
    if version_py:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/version.py").write_text(f"__version__ = '0'\n{version_py}\n")
    monkeypatch.syspath_prepend(tmp_path)
    if "megatron-bridge" not in packages:
        installed = stack.installed_version
        monkeypatch.setattr(
            stack, "installed_version", lambda n: None if "bridge" in n else installed(n)
        )
    assert stack.present() == found


def test_only_the_stack_that_is_here_is_proposed():
    """Not a torch for CPUs over one for GPUs."""
    reports = [stack.check(compat.CPU, {}.get, "3.12.1"), gpu_report(vllm=None)]
    told = stack.render(reports, "gpu")
    assert "(check_stack.py --stack cpu lists them)\nGPU stack: not installed, 1 of " in told
    assert "download.pytorch.org" not in told and "  -> missing or wrong: 'vllm==0.24.0'" in told


@pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="a checkout that is not installed is read with tomllib (3.11)",
)
@IN_THE_CPU_STACK
def test_in_an_empty_environment(tmp_path):
    """A fresh virtual environment without pip: first nothing at all, then packaging, then (faked)
    the whole CPU stack.
    """
    venv.create(tmp_path / "venv", with_pip=False)
    python, site = str(tmp_path / "venv" / "bin" / "python"), tmp_path / "site"
    site.mkdir()
    nothing = run_script(python=python, PYTHONPATH=str(site))
    assert nothing.returncode == 1 and nothing.stdout == ""
    assert (
        nothing.stderr.startswith("check_stack.py: No module named 'packaging': run ")
        and "Trace" not in nothing.stderr
    )

    shutil.copytree(Path(packaging.__file__).parent, site / "packaging")
    empty = run_script("--json", python=python, PYTHONPATH=str(site))
    assert empty.returncode == 1, empty.stderr
    stacks = json.loads(empty.stdout)["stacks"]
    assert {p["status"] for s in stacks for p in s["packages"]} == {"missing"}
    assert (
        f"'torch=={pin('torch')}'" in stacks[0]["install"][0]
        and f"'ray[default]=={pin('ray')}'" in stacks[0]["install"][0]
    )

    for package in stacks[0]["packages"]:
        fake_distribution(site, package["name"], importlib.metadata.version(package["name"]))
    full = run_script("--json", python=python, PYTHONPATH=str(site))
    assert full.returncode == 0 and json.loads(full.stdout)["installed"] == ["cpu"], full.stdout
    (site / f"verl-{importlib.metadata.version('verl')}.dist-info" / "METADATA").unlink()
    fake_distribution(site, "verl", "0.8.0")
    outdated = run_script("--stack", "cpu", python=python, PYTHONPATH=str(site))
    assert (
        outdated.returncode == 1
        and f"1 of {len(stacks[0]['packages']) + 1} missing or wrong" in outdated.stdout
    )
    assert outdated.stdout.splitlines()[-1].endswith(
        "https://download.pytorch.org/whl/cpu 'verl==" + pin("verl") + "'"
    )


def test_unreadable_project_is_one_sentence(monkeypatch, capsys, tmp_path):
    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    monkeypatch.setattr(stack, "PYPROJECT", tmp_path / "pyproject.toml")
    assert stack.main([]) == 1
    assert capsys.readouterr().err.startswith(
        "check_stack.py: capo-verl is not installed, and Python 3."
    )


def fake_megatron(monkeypatch, model_type: type[enum.Enum]) -> ModuleType:
    """``mbridge.core.util`` as mbridge 0.15.1 imports it, over a megatron-core with this
    ``ModelType``.
    """
    util = ModuleType("mbridge.core.util")
    util.ModelType = model_type
    core = ModuleType("mbridge.core")
    core.util = util
    enums = ModuleType("megatron.core.enums")
    enums.ModelType = model_type
    modules = {
        "mbridge": ModuleType("mbridge"),
        "mbridge.core": core,
        "mbridge.core.util": util,
        "megatron": ModuleType("megatron"),
        "megatron.core": ModuleType("megatron.core"),
        "megatron.core.enums": enums,
    }
    for name, module in modules.items():  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    return util


def test_model_type_gets_back_what_mbridge_reads(monkeypatch):
    newer = enum.Enum("ModelType", ["encoder_or_decoder"])
    util = fake_megatron(monkeypatch, newer)
    compat.shim_mbridge()
    assert util.ModelType.encoder_or_decoder is newer.encoder_or_decoder
    assert all(util.ModelType.encoder_and_decoder != member for member in newer)


def test_model_type_of_older_megatron_stays(monkeypatch):
    older = enum.Enum("ModelType", ["encoder_or_decoder", "encoder_and_decoder"])
    util = fake_megatron(monkeypatch, older)
    compat.shim_mbridge()
    assert util.ModelType is older


@pytest.mark.parametrize("present", [("torch",), ("state_dict_saver", "torch"), ()])
def test_checkpoint_modules_that_exist_are_imported(tmp_path, present):
    strategies = tmp_path / "megatron" / "core" / "dist_checkpointing" / "strategies"
    strategies.mkdir(parents=True)
    for folder in (strategies, *strategies.parents[:3]):
        (folder / "__init__.py").touch()
    for name in (*present, "lazy"):
        (strategies / f"{name}.py").touch()
    code = (
        "import sys; from capo_verl.plugin import compat; compat.import_checkpoint_modules();"
        "print(sorted(n.rpartition('.')[2] for n in sys.modules if "
        "n.startswith('megatron.core.dist_checkpointing.strategies.')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == str(sorted(present)), result.stderr


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "default",
        ),  # transformers 5
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),  # transformers 4
        ({"rope_scaling": None}, "default"),
        ({}, "default"),
    ],
)
def test_rope_type(config: dict, expected: str):
    assert compat.rope_type(SimpleNamespace(**config)) == expected


def test_rope_theta_becomes_an_attribute(monkeypatch):
    verl = ModuleType("verl.utils.megatron_utils")
    verl.get_hf_rope_theta = lambda config: config.rope_parameters["rope_theta"]
    monkeypatch.setitem(sys.modules, "verl.utils.megatron_utils", verl)
    newer = SimpleNamespace(rope_parameters={"rope_theta": 1e6})
    older = SimpleNamespace(rope_theta=5e5, rope_parameters={"rope_theta": 1.0})
    for config in (newer, older):
        compat.shim_rope_theta(config)
    assert (newer.rope_theta, older.rope_theta) == (1e6, 5e5)
