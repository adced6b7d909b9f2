# SPDX-License-Identifier: Apache-2.0
"""Every link inside the repository leads somewhere, anchors included.

Links to the web are looked at for their form only.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.docs.markdown import PAGES, ROOT, anchors, links

RESULTS = sorted((ROOT / "capo_verl/experiments/results").glob("*.md"))


def broken(page: Path) -> list[str]:
    found = []
    for link in links(page):
        url = urlsplit(link)
        if url.scheme:
            if url.scheme != "https" or not url.netloc:
                found.append(link)
            continue
        target = page if not url.path else (page.parent / url.path).resolve()
        if (
            not target.exists()
            or not target.is_relative_to(ROOT)
            or (url.fragment and url.fragment not in anchors(target))
        ):
            found.append(link)
    return found


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", *RESULTS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path, monkeypatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr("tests.docs.test_links.ROOT", tmp_path)
    page.write_text(
        "# A title, `code`\n[a](#a-title-code) [b](#nowhere) [c](gone.md) ![d](d.png) "
        "[e](http://x.org) `[f](g)`\n"
    )
    assert broken(page) == ["#nowhere", "gone.md", "d.png", "http://x.org"]
