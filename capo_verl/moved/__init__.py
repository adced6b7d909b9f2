# SPDX-License-Identifier: Apache-2.0
"""Modules under their names of release 0.1, a line each: this folder is part of
``capo_verl.__path__``.
"""
