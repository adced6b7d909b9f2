# SPDX-License-Identifier: Apache-2.0
"""Work around a run: planning it, checking it, starting it."""
