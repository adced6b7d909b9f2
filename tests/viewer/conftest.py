# SPDX-License-Identifier: Apache-2.0
"""A real headless Chromium, one for all tests of the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.viewer.logs import write_runs

BROWSER, DRIVER = "chromium", "chromedriver"
SECONDS = 60
"""To wait for a condition at most; a loaded machine needs some of them."""
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-default-apps",
    "--force-device-scale-factor=1", "--hide-scrollbars",
)  # fmt: skip


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which(BROWSER) and shutil.which(DRIVER)):
        pytest.skip(
            f"{BROWSER} and {DRIVER} are not installed (apt-get install chromium chromium-driver)"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which(BROWSER))
    profile = tmp_path_factory.mktemp("chromium")
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=str(shutil.which(DRIVER)))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(SECONDS)
    driver.set_script_timeout(SECONDS)
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about three runs."""
    from capo_verl.commands.main import main

    folder = tmp_path_factory.mktemp("report")
    assert (
        main(["report", str(write_runs(folder / "runs")), "--output", str(folder / "report.html")])
        == 0
    )
    return folder / "report.html"


@pytest.fixture
def open_page(browser, report) -> Callable:
    """Load a page afresh and wait until its script has run; returns the driver."""
    from selenium.webdriver.support.ui import WebDriverWait

    def open_it(width: int = 1400, height: int = 1000, page: Path = report):
        browser.set_window_size(width, height)
        for kind in ("browser", "performance"):  # reading empties them
            browser.get_log(kind)
        browser.get(page.as_uri())
        WebDriverWait(browser, SECONDS).until(
            lambda d: d.execute_script("return document.documentElement.dataset.ready") == "yes"
        )
        return browser

    return open_it


def requested(driver) -> list[str]:
    """Addresses which the browser asked for since the page was opened."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
