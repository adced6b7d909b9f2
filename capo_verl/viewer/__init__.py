# SPDX-License-Identifier: Apache-2.0
"""Views of a run: figures (``capo-verl plot``) and an interactive page (``capo-verl report``).

Both are made from logs on disk.
"""
