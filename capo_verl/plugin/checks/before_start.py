# SPDX-License-Identifier: Apache-2.0
"""Everything that is refused before a run starts, in the driver and before any GPU time is spent.

Each refusal is one sentence.
"""

from __future__ import annotations

import logging

from omegaconf import DictConfig

from capo_verl.plugin.bridge import check_bridge
from capo_verl.plugin.checks.asynchronous import check_trainer_mode
from capo_verl.plugin.checks.capo import check_capo
from capo_verl.plugin.checks.files import check_files
from capo_verl.plugin.checks.identity import check_identity
from capo_verl.plugin.checks.names import check_names
from capo_verl.plugin.checks.resume import check_resume
from capo_verl.plugin.checks.rivals import check_rival
from capo_verl.plugin.checks.router_replay import check_router_replay
from capo_verl.plugin.checks.sizes import check_sizes, check_warmup
from capo_verl.plugin.checks.vllm_on_cpu import check_vllm_installed, check_vllm_on_cpu

logger = logging.getLogger(__name__)


def check_config(config: DictConfig) -> None:
    """Check what verl's whole config says by itself, also for a run on other machines.

    Raises:
        ValueError: naming key and value, and what to set.
        RuntimeError: if CAPO is switched on and the plugin is not registered properly.
    """
    for check in (
        check_warmup, check_names, check_trainer_mode, check_vllm_on_cpu, check_router_replay,
        check_sizes, check_rival, check_capo,
    ):  # fmt: skip
        check(config)


def before_start(config: DictConfig) -> None:
    """Check a run that is about to start: its config, its files, and its earlier checkpoints.

    Raises:
        ValueError: naming key or file, the value, and what to set.
        RuntimeError: if CAPO is switched on and the plugin is not registered properly.
    """
    check_config(config)
    check_bridge(config)
    check_vllm_installed(config)
    for note in check_files(config):
        logger.info(note)
    check_resume(config)
    check_identity(config)
