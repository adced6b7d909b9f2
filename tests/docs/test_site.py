# SPDX-License-Identifier: Apache-2.0
"""The site builds without a warning, holds every page, and needs no network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, SITE

pytest.importorskip("sphinx", reason="needs the extra docs")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    navigation = (site / "index.html").read_text(encoding="utf-8")
    for page in SITE:
        html = site / f"{page.stem}.html"
        assert html.exists(), page.name
        assert page.stem == "index" or f'href="{html.name}"' in navigation, page.name


def test_nothing_is_loaded_from_the_web(site: Path) -> None:
    pages = list(site.glob("*.html"))
    assert len(pages) >= len(SITE)
    for html in pages:
        text = html.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img)[^>]* src="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="([^"]+)"', text)
        assert len(loaded) > 3 and not [url for url in loaded if "//" in url], html.name


def test_knobs_have_their_docstrings(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text(encoding="utf-8"))
    assert "Support size: how many of the largest logits stand for the policy" in text
