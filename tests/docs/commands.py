# SPDX-License-Identifier: Apache-2.0
"""Every command of README and docs, and how a machine without GPUs, hub or hours executes it.

A command is executed as it stands, in a copy of the repository in which the files it names exist
(``MODEL``, ``FOLDER`` and so on are real). Where it would take long, arguments at its end make it
shorter; where it needs GPUs, it is a dry run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tests.docs.markdown import PAGES, blocks


@dataclass(frozen=True)
class Command:
    text: str
    """One command, its continuation lines joined, without comment."""
    places: tuple[str, ...]
    """``page:line`` of each block that has it."""


@dataclass(frozen=True)
class How:
    """How commands that match ``pattern`` as a whole are executed."""

    pattern: str
    says: str = ""
    """Regular expression that its output has to contain."""
    append: str = ""
    """Further arguments."""
    prefix: str = ""
    """Environment variables."""
    code: int = 0
    """Exit code."""
    makes: tuple[str, ...] = ()
    """Files that exist afterwards."""
    check: Callable[[str], bool] = lambda output: True
    """Whether its output is as it should be, where that takes more than ``says``."""
    needs: str = ""
    """A package without which it is skipped."""
    ray: bool = False
    """Starts Ray."""


_FEW = (
    "trainer.total_training_steps=1 trainer.val_before_train=False trainer.test_freq=-1 "
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0"
)
_SMALL_BENCHMARK = "--vocab-size 512 --hidden-size 32 --tokens 64 --repeats 1"
_SHORT = "--max-prompt-length 64 --max-response-length 4"


def _rewards_rise(output: str) -> bool:
    rewards = [
        float(reward) for reward in re.findall(r"^step .* reward ([0-9.]+)", output, re.MULTILINE)
    ]
    return len(rewards) == 60 and sum(rewards[-10:]) > sum(rewards[:10]) + 0.5


HOW = (
    # what runs here is this repository's own tests, so one of them stands for all
    How(r"bash scripts/test\.sh", append="tests/docs/test_links.py -q",
        prefix="CAPO_SKIP_INSTALL=1", says=r"\d+ passed"),
    How(r"bash scripts/test\.sh -m .*", append="tests/docs --collect-only -q",
        prefix="CAPO_SKIP_INSTALL=1", says="collected"),
    How(r"bash scripts/test\.sh \S.*", append="--collect-only -q", prefix="CAPO_SKIP_INSTALL=1",
        says=r"tests? collected"),
    How(r"bash scripts/quickstart\.sh( (CAPO|GRPO))?", append=_FEW, prefix="CAPO_SKIP_INSTALL=1",
        ray=True, says="held-out"),
    How(r"(\w+=\S+ )*bash scripts/test_gpu_stack\.sh.*", prefix="CAPO_SKIP_INSTALL=1",
        code=2, says="the GPU stack needs Python 3.12"),
    # tests/e2e/test_vllm.py trains with it
    How(r"bash scripts/quickstart\.sh CAPO --rollout vllm", append="--prepare-only",
        prefix="CAPO_SKIP_INSTALL=1", says="MODEL_PATH"),
    How(r"pip install (-e )?\S+", append="--dry-run --no-deps --no-build-isolation", says="Would "
    "install capo-verl"),
    How(r"python scripts/check_stack\.py", says="CPU stack: complete"),
    How(r"capo-verl doctor --gpu.*", says="finds no GPU here", code=2),
    How(r"capo-verl doctor.*", prefix="VERL_PLATFORM=cpu", ray=True,
        says=r"(?i)all .*checks passed|\"status\": \"ok\""),
    How(r"make \w+", append="--dry-run"),
    How(r"capo-verl data judge .*", says="^equal: 1$|\nequal: 1$"),
    How(r"sphinx-build .*", makes=("outputs/site/index.html",)),
    # GPU launchers
    How(r"DRY_RUN=1 bash examples/run_qwen\S+_megatron\.sh( >resolved\.yaml)?", says=r"GiB"),
    How(r"(\w+=\S+ )*bash examples/run_qwen\S+_megatron\.sh.*", prefix="DRY_RUN=1", says=r"GiB"),
    How(r"(\w+=\S+ )*bash scripts/slurm/submit\.sh .*", says=r"Submitted batch job 1"),
    How(r"(\w+=\S+ )*bash examples/run_\w+_cpu\.sh.*", prefix="DRY_RUN=1 CAPO_SKIP_INSTALL=1",
        says="policy_loss"),
    # a cluster by hand: it needs other machines, and a Ray that stays would be found by every later
    # test; its options are checked
    How(r"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=.*"),
    How(r"ray start .*", append="--help", says=r"--node-ip-address"),
    # data
    How(r"capo-verl data math .*--from FOLDER .*", append="--overwrite",
        makes=("data/math/train.parquet",)),
    How(r"capo-verl data mine --from FILE .*", makes=("data/mine/train.parquet",)),
    How(r"capo-verl data .*--from package .*", append="--output outputs/package",
        makes=("outputs/package/asdiv/test.parquet",)),
    How(
        r"capo-verl data reasoning_gym/countdown .*", append="--train-size 8 "
        "--test-size 4 --output outputs/generated",
        makes=("outputs/generated/reasoning_gym_countdown/train.parquet",),
    ),
    How(r"capo-verl data math .*", append="--output outputs/hub", code=2,
        says="hub"),
    How(r"capo-verl evaluate .*",
        append=f"{_SHORT} --max-prompt-length 128 --limit 2 --reward reward.py",
        prefix="VERL_PLATFORM=cpu", ray=True, says="avg@16"),
    # plots
    How(r"capo-verl plot .*", makes=("figures",)),
    How(r"capo-verl report .*", makes=("report.html",)),
    How(r"capo-verl calibrate .*--device cuda", code=2, says="cuda"),
    How(r"capo-verl calibrate .*", append=f"{_SHORT} --steps 2 --batch 8 -n 4 --reward "
    "reward.py:compute_score", says="delta"),
    # experiments
    How(r"python -m capo_verl\.experiments\.calibration run .*", append="--only tiny",
        makes=("outputs/calibration_study/calibration_tokens.png",)),
    How(r"python -m capo_verl\.experiments\.calibration draw",
        makes=("capo_verl/experiments/results/calibration_tokens.png",)),
    How(r"python -m capo_verl\.experiments\.study run \S+\.yaml.*", append="--limit 1",
        says=r"1 finished"),
    How(r"python -m capo_verl\.experiments\.study (status|tables|pack) .*"),
    How(r"python -m capo_verl\.experiments\.study\.evidence",
        makes=("capo_verl/experiments/results/base-curves.png",)),
    How(r"(\w+=\S+ )*python -m capo_verl\.experiments\.benchmark.*", append=_SMALL_BENCHMARK,
        says="evaluate"),
    How(r"capo-verl plan --config resolved\.yaml --json", says=r'"'),
    How(r"capo-verl plan .*", says="GiB"),
    How(r"python -m tests\.packaging\.public_api"),
    How(r"python examples/outside_verl/plain_pytorch\.py.*", check=_rewards_rise),
    How(r"python examples/outside_verl/trl_grpo\.py.*", check=_rewards_rise, needs="trl"),
)  # fmt: skip


def commands() -> list[Command]:
    """Those of all fenced ``bash`` blocks, each once."""
    places: dict[str, list[str]] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language != "bash":
                continue
            joined = re.sub(r"[ \t]*(#[^\n]*)?\\?\n[ \t]+", _continuation, block.text)
            for line in joined.splitlines():
                text = re.sub(r"(^|\s+)# .*$", "", line).strip()
                if text:
                    places.setdefault(text, []).append(f"{page.name}:{block.line}")
    return [Command(text, tuple(found)) for text, found in places.items()]


def _continuation(found: re.Match[str]) -> str:
    return " " if "\\" in found[0] else found[0]


def how(command: Command) -> How:
    """
    Raises:
        KeyError: for a command of which nobody said how it is executed.
    """
    for rule in HOW:
        if re.fullmatch(rule.pattern, command.text):
            return rule
    raise KeyError(
        f"{command.places[0]}: nobody says in tests/docs/commands.py how to execute: {command.text}"
    )
