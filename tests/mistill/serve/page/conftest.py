"""A real browser without a window, for tests that are marked slow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.benchmarks.report.chromium import find_chromium
from tests.mistill.serve.page.chat_page import ChatPage
from tests.mistill.serve.page.scripted_server import Script, scripted_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

Opened = Callable[..., ChatPage]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed; apt-get install chromium brings one")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def scripted() -> Iterator[tuple[str, Script]]:
    """The address of a server, and what it does next."""
    with scripted_server() as (address, script):
        yield address, script


@pytest.fixture
def script(scripted: tuple[str, Script]) -> Script:
    return scripted[1]


@pytest.fixture
def open_page(browser: Browser, scripted: tuple[str, Script]) -> Iterator[Opened]:
    """Open the page in an empty profile.

    When the test ends, no page may have asked anything of another place, met a fault in its own
    programs, or broken the content security policy, unless the test took note of it.
    """
    pages: list[ChatPage] = []

    def opened(
        address: str = "", *, fragment: str = "", ready: bool = True, **options: Any
    ) -> ChatPage:
        place = address or scripted[0]
        page = ChatPage.opened(browser, place, fragment, ready, options)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        try:
            page.check()
        finally:
            page.page.context.close()


@pytest.fixture
def chat(open_page: Opened) -> ChatPage:
    """The page at 1280 by 900, in English."""
    return open_page()
