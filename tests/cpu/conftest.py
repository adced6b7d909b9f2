# SPDX-License-Identifier: Apache-2.0
import capo_verl.cpu.platform  # noqa: F401  before verl is asked for its platform
