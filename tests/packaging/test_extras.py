# SPDX-License-Identifier: Apache-2.0
"""The extras that are documented are those that exist; and no two of them, nor the dependencies,
contradict each other.
"""

from __future__ import annotations

import re
from itertools import combinations

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.conftest import ROOT
from tests.packaging.test_distributions import project

ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


def test_table_lists_every_extra_in_order():
    section = (ROOT / "docs" / "public_api.md").read_text().partition("## Extras")[2]
    assert ROW.findall(section) == list(project()["optional-dependencies"])


def test_every_dependency_has_a_range():
    about = project()
    lines = [line for lines in about["optional-dependencies"].values() for line in lines]
    unbounded = [
        line for line in [*about["dependencies"], *lines] if not Requirement(line).specifier
    ]
    assert unbounded == []


def test_extras_go_together():
    """A version that one extra pins is inside every other's range, so that all can be installed at
    once.
    """
    about = project()
    found: dict[str, list[Requirement]] = {}
    for line in [
        *about["dependencies"],
        *(line for lines in about["optional-dependencies"].values() for line in lines),
    ]:
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    pairs = [pair for same in found.values() for pair in combinations(same, 2)]
    pinned = [
        (a, b) for pair in pairs for a, b in (pair, pair[::-1]) if str(a.specifier).startswith("==")
    ]
    assert any(a.name == "torch" for a, b in pinned)
    for a, b in pinned:
        assert b.specifier.contains(next(iter(a.specifier)).version), (str(a), str(b))
