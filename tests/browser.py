"""A page in Chromium, with no network."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

Opened = Callable[..., tuple[Any, list[str]]]

PATIENCE = 600_000
"""Milliseconds. Playwright's own 30 s to start, to open and to click are too few beside other work."""


@contextmanager
def in_browser(path: Path, ready: str = "body") -> Iterator[Opened]:
    """Opens a page as often as it is asked to: `open_at(width, height)` gives it, and all that it says or asks for.

    Args:
        path: The page.
        ready: What is there when it is drawn, as a CSS selector.
    """
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable, args=["--no-sandbox"], timeout=PATIENCE)

        def open_at(width: int, height: int, **more: Any) -> tuple[Any, list[str]]:
            tab = browser.new_context(viewport={"width": width, "height": height}, offline=True, **more).new_page()
            tab.set_default_timeout(PATIENCE)
            said: list[str] = []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
            tab.goto(path.as_uri())
            tab.wait_for_selector(ready, state="attached")
            return tab, [words for words in said if not words.startswith("data:")]

        yield open_at
        browser.close()
