"""The fixtures of the tests in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from support.browser import Tabs, chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run a browser for one module only: while playwright runs, `asyncio.run` refuses, as the thread has a loop."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def tabs(browser: Browser) -> Iterator[Tabs]:
    tabs = Tabs(browser)
    yield tabs
    tabs.close()
