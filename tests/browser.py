"""A page in Chromium, with no network."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

Opened = Callable[..., tuple[Any, list[str]]]


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
        browser = p.chromium.launch(executable_path=executable, args=["--no-sandbox"])

        def open_at(width: int, height: int, **more: Any) -> tuple[Any, list[str]]:
            tab = browser.new_context(viewport={"width": width, "height": height}, offline=True, **more).new_page()
            said: list[str] = []
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("request", lambda request: said.append(request.url) if request.url != path.as_uri() else None)
            tab.goto(path.as_uri())
            tab.wait_for_selector(ready, state="attached", timeout=600_000)
            return tab, [words for words in said if not words.startswith("data:")]

        yield open_at
        browser.close()
