# SPDX-License-Identifier: Apache-2.0
"""What is in the sdist and in the wheel, to the file; and what the wheel says about itself."""

from __future__ import annotations

import email
import re
import shutil
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from capo_verl.plugin.stack import declared
from tests.packaging.conftest import ROOT, build

ASSETS = {
    "common.js",
    "configs.js",
    "curves.js",
    "main.js",
    "plot.js",
    "report.css",
    "report.html",
    "series.js",
    "tokens.js",
}
DATA = {
    "capo_verl/py.typed",
    "capo_verl/plugin/REQUIRED_VERL.txt",
    *(f"capo_verl/viewer/assets/{name}" for name in ASSETS),
}
EXPERIMENTS = "capo_verl/experiments/"
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
MACHINE_PATHS = re.compile(rb"/(?:tmp|home|root|Users)/[\w.]+/")


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def modules(source) -> set[str]:
    """Every Python file of the two packages in the checkout, but for the experiments."""
    files = [
        file
        for package in ("capo_verl", "hydra_plugins")
        for file in (source / package).rglob("*.py")
    ]
    found = {file.relative_to(source).as_posix() for file in files}
    experiments = {name for name in found if name.startswith(EXPERIMENTS)}
    assert len(experiments) > 40
    found -= experiments
    assert {
        "capo_verl/core/kernels/fused/support_kernel.py",
        "hydra_plugins/capo_verl_search_path.py",
    } <= found
    return found


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="session")
def metadata(wheel) -> Message:
    (text,) = (
        text for name, text in contents(wheel).items() if name.endswith(".dist-info/METADATA")
    )
    return email.message_from_string(text.decode())


def test_wheel_holds_the_packages_and_nothing_else(wheel, modules):
    files = contents(wheel)
    info = f"capo_verl-{project()['version']}.dist-info"
    assert set(files) == modules | DATA | {f"{info}/{name}" for name in METADATA}
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert files[f"{info}/top_level.txt"].split() == [b"capo_verl", b"hydra_plugins"]
    assert b"Root-Is-Purelib: true\nTag: py3-none-any\n" in files[f"{info}/WHEEL"]


def test_wheel_and_sdist_leave_the_experiments_out(wheel, sdist):
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive.getmembers()]
    found = [name for name in (*contents(wheel), *names) if name.startswith(EXPERIMENTS)]
    assert names and found == []


def test_wheel_holds_the_files_of_the_checkout(wheel, source):
    for name, text in contents(wheel).items():
        if ".dist-info/" not in name:
            assert text == (source / name).read_bytes(), name
            assert MACHINE_PATHS.findall(text) == [], name


def test_sdist_holds_the_packages_and_what_builds_them(sdist, modules):
    with tarfile.open(sdist) as archive:
        files = {member.name for member in archive.getmembers() if member.isfile()}
        owners = {(member.uname, member.gname) for member in archive.getmembers()}
    top = f"capo_verl-{project()['version']}"
    egg_info = (
        "PKG-INFO",
        "SOURCES.txt",
        "dependency_links.txt",
        "entry_points.txt",
        "requires.txt",
        "top_level.txt",
    )
    expected = modules | DATA | {f"capo_verl.egg-info/{name}" for name in egg_info}
    expected |= {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert files == {f"{top}/{name}" for name in expected}
    assert len(owners) == 1


def test_wheel_from_the_sdist_is_the_wheel_from_the_checkout(sdist, wheel, tmp_path):
    shutil.unpack_archive(sdist, tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    again = build("build_wheel", unpacked, tmp_path)
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


def test_metadata_is_that_of_pyproject(metadata):
    about = project()
    assert metadata["Name"] == "capo-verl" and metadata["Version"] == about["version"]
    assert set(metadata["Requires-Python"].split(",")) == {">=3.10", "<3.13"}
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == [
        "LICENSE"
    ]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    assert metadata.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2510.00819"]


def test_every_extra_arrives_with_its_requirements(metadata):
    about = project()
    assert metadata.get_all("Provides-Extra") == list(about["optional-dependencies"])
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    plain = {(r.name, r.specifier) for r in required if r.marker is None}
    assert plain == {(r.name, r.specifier) for r in map(Requirement, about["dependencies"])}
    for extra, lines in about["optional-dependencies"].items():
        wanted = [
            r
            for r in map(Requirement, lines)
            if r.marker is None or r.marker.evaluate({"extra": ""})
        ]
        found = [r for r in required if r.marker and r.marker.evaluate({"extra": extra})]
        assert {(r.name, *sorted(r.extras), r.specifier) for r in found} == {
            (r.name, *sorted(r.extras), r.specifier) for r in wanted
        }, extra


def test_entry_points(wheel):
    (text,) = (text for name, text in contents(wheel).items() if name.endswith("/entry_points.txt"))
    assert text.decode().split() == [
        "[console_scripts]", "capo-verl", "=", "capo_verl.commands.main:main",
        "[verl.plugins]", "capo_verl", "=", "capo_verl.plugin.register",
    ]  # fmt: skip


def test_required_verl_is_the_pin_of_the_cpu_stack(installed):
    (verl,) = (
        str(r)
        for r in map(Requirement, project()["optional-dependencies"]["cpu"])
        if r.name == "verl"
    )
    assert (
        installed.site_packages / "capo_verl" / "plugin" / "REQUIRED_VERL.txt"
    ).read_text() == f"{verl}\n"
    assert [str(r) for r in declared("cpu")[1] if r.name == "verl"][0].partition(";")[
        0
    ].strip() == verl
