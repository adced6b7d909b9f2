# SPDX-License-Identifier: Apache-2.0
"""``capo-verl doctor``: one file per thing that is looked at; ``checks`` has the list.

Described in ``docs/doctor.md``.
"""
