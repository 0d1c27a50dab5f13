"""A headless browser for the tests of pages: one that is installed, with a profile of its own and no network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

WIDE, NARROW = {"width": 1600, "height": 1000}, {"width": 390, "height": 844}
"""A desktop and a phone."""


@contextmanager
def installed_browser() -> Iterator[Browser]:
    """The browser that is installed; skips the test where none is."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is in PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and what it did that it should not: requests beside its own file, messages on the console, errors."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def ask(self, script: str, argument: Any = None) -> Any:
        """The value of a JavaScript expression or function in the page."""
        return self.page.evaluate(script, argument)

    def select(self, selector: str) -> list[str]:
        """``data-row`` of all elements that a selector finds."""
        found: list[str] = self.ask(
            "selector => [...document.querySelectorAll(selector)].map(e => e.dataset.row)", selector
        )
        return found

    def middle(self, selector: str, index: int = 0) -> tuple[float, float]:
        """Middle of an element, in pixels of the window."""
        x, y = self.ask(
            """([selector, index]) => {
                const element = document.querySelectorAll(selector)[index];
                const box = (element.querySelector("rect") || element).getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }""",
            [selector, index],
        )
        return x, y

    def point(self, selector: str, index: int = 0) -> None:
        self.page.mouse.move(*self.middle(selector, index))

    def domain(self) -> tuple[float, float]:
        """From when to when the timeline shows."""
        low, high = self.ask("[timeline.dataset.low, timeline.dataset.high].map(Number)")
        return low, high


@contextmanager
def opened(browser: Browser, path: Path, *, viewport: dict[str, int] = WIDE, **options: Any) -> Iterator[Opened]:
    """A file in a window; fails at the end if it did anything but draw itself."""
    context = browser.new_context(viewport=viewport, **options)  # type: ignore[arg-type]
    result = Opened(context.new_page())
    page, complaints = result.page, result.complaints

    def answer(route: Route) -> None:
        if route.request.url == path.as_uri():
            route.continue_()
        else:
            complaints.append(f"request: {route.request.url}")
            route.abort()

    context.route("**/*", answer)
    page.on("console", lambda message: complaints.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    yield result
    context.close()
    assert complaints == []
