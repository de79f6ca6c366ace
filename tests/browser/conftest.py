"""One JupyterLab and one Chromium for all browser tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.lab import CHROMIUM_ARGUMENTS, Lab, find_chromium


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
