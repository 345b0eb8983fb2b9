"""A real Chromium, and its tabs, whose every complaint fails the test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
# No sandbox, for the tests of a container run as root; the rest keeps it from talking to anybody but the endpoint.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# A page asks every two seconds; on a machine that is busy an answer may take longer than playwright's own five.
expect.set_options(timeout=30_000)

# What a policy has stopped is told in the console anyhow; this says more of it.
TELL_VIOLATIONS = """addEventListener("securitypolicyviolation", (event) =>
    console.error("policy violated:", event.violatedDirective, event.blockedURI, event.sample));"""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Skips the test where there is none; fails it in continuous integration, which has to have one."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = "no chromium on PATH to test the page in: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


class Tabs:
    """Tabs of one test, each in a context of its own.

    Attributes:
        complaints: what stood in the consoles as errors, and the exceptions that nobody caught.
        expected: parts of those that the test is about.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.complaints: list[str] = []
        self.expected: tuple[str, ...] = ()

    def open(self, url: str, **options: Any) -> Page:
        """A tab at `url`; `options` are of the browser's context: viewport, color_scheme..."""
        page = self._browser.new_context(**options).new_page()
        page.add_init_script(TELL_VIOLATIONS)
        page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(url)
        return page

    def close(self) -> None:
        """Close them all; fails the test if there was a complaint that it did not expect."""
        for context in self._browser.contexts:
            context.close()
        assert [text for text in self.complaints if not any(part in text for part in self.expected)] == []
