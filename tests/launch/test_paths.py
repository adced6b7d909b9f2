# SPDX-License-Identifier: Apache-2.0
"""Paths with anything in them reach verl as they are, or are refused in one line."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from tests.launch.launchers import ROOT, call, command_line

ODD = [
    "/a b", "/it's", "/a\\b", "/a\\'b", "/a\\", "/a\\\\", "/a\n", "/a\nb", "/a\\\nb", "/{x}",
    "/a,b", "/a=b",
    "/$x", '/a"b', "/[1]", "/#x", "/%d", "/~", " /a ", "/'", "/é", "/a:b", "/\t",
]  # fmt: skip
COMMON = (ROOT / "examples/common.sh").read_text("utf-8")
QUOTED = re.search(r"^quoted\(\) \{\n.*?^\}\n", COMMON, re.MULTILINE | re.DOTALL)


def through_the_shell(text: str) -> str:
    """What ``quoted`` of the launchers makes of a text."""
    script = f'{QUOTED[0]}\nquoted "$1"'
    return subprocess.run(["bash", "-c", script, "bash", text], capture_output=True, check=True,
                          text=True).stdout  # fmt: skip


@pytest.fixture(scope="module")
def hydra(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hydra")
    (folder / "config.yaml").write_text("path: x\n")
    with initialize_config_dir(str(folder), version_base=None):
        yield lambda value: compose("config", overrides=[f"path={value}"]).path


@pytest.mark.parametrize("path", ODD)
def test_a_path_is_what_hydra_reads(hydra, path):
    assert hydra(through_the_shell(path)) == path


def test_any_path(hydra):
    @given(st.text("a\\'{}\n ,:=\"$é[]", max_size=12).filter(lambda text: "${" not in text))
    def reads(path):
        assert hydra(through_the_shell("/" + path)) == "/" + path

    reads()


@pytest.mark.parametrize("variable", ["OUTPUT_DIR", "DATA_DIR", "MODEL_PATH"])
def test_a_reference_is_refused(tmp_path, variable):
    variables = {"MODEL_PATH": "m", variable: "/data/${user}"}
    done = call("run_quickstart_cpu.sh", tmp_path, **variables)
    assert done.returncode == 2
    assert done.stderr == (
        f"run_quickstart_cpu.sh: {variable}=/data/${{user}} has ${{ in it, which OmegaConf "
        "resolves: choose another name\n"
    )


def test_a_folder_with_all_of_them(tmp_path, hydra):
    folder = tmp_path / "a {b}, it's\n"
    _, *overrides = command_line(
        "run_quickstart_cpu.sh", tmp_path, MODEL_PATH="m", OUTPUT_DIR=folder
    )
    (given_,) = (o for o in overrides if o.startswith("trainer.default_local_dir="))
    assert hydra(given_.partition("=")[2]) == f"{folder}/checkpoints"


def choose_environment(**environment: str) -> subprocess.CompletedProcess[str]:
    """Options of srun that a job in a container gets, one on a line."""
    script = (
        'say() { echo "$*"; }; root=$1; source scripts/slurm/cluster.sh; attempt=0; '
        'refuse() { echo "$*" >&2; exit 2; }; choose_environment; '
        'printf "%s\\n" "${SRUN_OPTIONS[@]}"'
    )
    return subprocess.run(
        ["bash", "-euc", script, "bash", environment.pop("root", "/repo")], cwd=ROOT, text=True,
        capture_output=True,
        check=False, env={"PATH": "/usr/bin:/bin", "OUTPUT_DIR": "/out", "RAY_TMP_ROOT": "/tmp",
        "CONTAINER_IMAGE": "i", **environment},
    )  # fmt: skip


def test_folders_with_spaces_are_mounted_in_containers():
    done = choose_environment(OUTPUT_DIR="/my out", CONTAINER_MOUNTS="/data sets:/data,/models")
    assert done.stdout.splitlines()[1] == (
        "--container-mounts=/repo:/repo,/my out:/my out,/tmp:/tmp,/data sets:/data,/models:/models"
    )


@pytest.mark.parametrize(("variable", "path"), [
    ("OUTPUT_DIR", "/out:1"), ("OUTPUT_DIR", "/a,b"), ("RAY_TMP_ROOT", "/tmp:x"), ("root",
    "/re,po"),
])  # fmt: skip
def test_what_cannot_be_mounted_is_refused(variable, path):
    done = choose_environment(**{variable: path})
    assert done.returncode == 2
    assert done.stderr.startswith(f"{variable}={path}: containers' mounts are separated by")


def test_a_nodes_log_may_have_braces_in_its_path():
    from capo_verl.launch.ray_cluster import log_of

    assert log_of("/a{b}/{0}/ray-{node}.log", "n1") == Path("/a{b}/{0}/ray-n1.log")
