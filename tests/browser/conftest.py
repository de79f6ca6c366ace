"""One JupyterLab and one Chromium for all browser tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.lab import CHROMIUM_ARGUMENTS, REPOSITORY, Lab, find_chromium

SCREENSHOTS = REPOSITORY / "build" / "screenshots"
"""Of each module the page as its `PICTURED` test leaves it, and of each test that failed its page."""


@pytest.fixture(scope="package")  # not longer: Playwright keeps an event loop running
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here: install Debian's package chromium, or set CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")  # not longer: Playwright keeps an event loop running
def lab(tmp_path_factory: pytest.TempPathFactory, browser: Any) -> Iterator[Lab]:
    """A JupyterLab server."""
    pytest.importorskip("jupyterlab")
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Keep a picture for people to look at."""
    report = yield
    pictured = getattr(item.module, "PICTURED", None)
    if report.when == "call" and (report.failed or item.name == pictured):
        name = item.name if report.failed else item.path.stem
        for value in item.funcargs.values():
            page = getattr(value, "page", value)
            if hasattr(page, "screenshot"):
                with contextlib.suppress(Exception):  # a page that is gone hides no failure
                    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
    return report
