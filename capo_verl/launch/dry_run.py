# SPDX-License-Identifier: Apache-2.0
"""``python -m capo_verl.launch.dry_run key=value ...``: what verl's ``main_ppo`` would run, without starting anything."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf


def compose(overrides: Sequence[str]) -> DictConfig:
    """verl's configuration for a command line, as its ``main_ppo`` composes it.

    Raises:
        hydra.errors.HydraException: if an override does not fit verl's configuration.
    """
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def validate(config: DictConfig) -> None:
    """verl's own checks, and in front of them this project's (``capo_verl.startup_checks``).

    Raises:
        ValueError, AssertionError: what verl's ``main_ppo`` would refuse before it starts Ray.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, need_reference_policy(config), need_critic(config))


def main(argv: Sequence[str] | None = None) -> int:
    config = compose(sys.argv[1:] if argv is None else argv)
    validate(config)
    print(OmegaConf.to_yaml(config, resolve=True), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
