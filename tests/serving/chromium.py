"""A real browser for the live page's tests: Debian's Chromium, driven by Playwright.

Every tab is watched: what it asks, from whom, what it writes to the console, and what breaks.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

CHROMIUM = shutil.which("chromium")
NEEDED = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; install it (Debian: apt-get install chromium)"
)
_REFUSED = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")


@dataclass
class Tab:
    """A page in a context of its own, and all that was seen of it."""

    page: Page
    asked: list[Request] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)
    """Statuses that the test expects; the browser itself writes each to the console."""

    def listen(self) -> None:
        """Watch it."""
        self.page.on("request", self._ask)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("console", self._note)
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))

    def _ask(self, request: Request) -> None:
        self.asked.append(request)

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.said.append(message.text)

    @property
    def origins(self) -> set[str]:
        """Whom it asked."""
        return {"://".join(urlsplit(one.url)[:2]) for one in self.asked}

    def check(self, address: str) -> None:
        """Nothing but this server was asked, and nothing was complained of."""
        assert self.origins == {address}, self.origins
        unexpected = [
            text
            for text in self.said
            if not ((found := _REFUSED.match(text)) and int(found[1]) in self.refused)
            and not (0 in self.refused and "net::ERR" in text)
        ]
        assert unexpected == [], unexpected

    def text(self, selector: str) -> str:
        """The text of one element, as it is seen."""
        return self.page.locator(selector).inner_text()


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, without a window."""
    assert CHROMIUM is not None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def tab(
    browser: Browser,
    address: str,
    *,
    width: int = 1280,
    height: int = 900,
    light: Literal["light", "dark"] = "light",
    **options: Any,
) -> Iterator[Tab]:
    """A new tab that knows nothing of others; at its end, `Tab.check`."""
    context = browser.new_context(
        base_url=address,
        viewport={"width": width, "height": height},
        color_scheme=light,
        **options,
    )
    made = Tab(context.new_page())
    made.page.set_default_timeout(20_000)
    made.listen()
    try:
        yield made
        made.check(address)
    finally:
        context.close()
