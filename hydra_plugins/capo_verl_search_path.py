# SPDX-License-Identifier: Apache-2.0
"""Makes the config groups ``capo`` and ``rival`` known to every Hydra application: ``+capo=grpo``
on any verl command line.

Hydra imports the modules of the namespace package ``hydra_plugins`` at start-up and asks their
plugins for search paths. The presets come as nodes from ``capo_verl.config``, their only
definition, not from files.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class CapoSearchPathPlugin(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from capo_verl.plugin.hydra_groups import store_groups

        # "structured://", which Hydra always searches, is where the config store lives
        store_groups()
