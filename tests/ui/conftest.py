"""A real browser for the page's tests: Chromium without a window, driven by Playwright, one for all of them.

Each test has a context of its own (storage, cookies), and fails where its page logs an error, throws, asks another host
for something, or tries what its Content-Security-Policy forbids.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

from tests.ui.browsing import DESKTOP, ELSEWHERE, PATIENCE, OpenPage

if TYPE_CHECKING:
    from tests.conftest import Server

CHROMIUM = os.environ.get("BDH_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
VIOLATIONS = "addEventListener('securitypolicyviolation', (e) => console.error('policy: ' + e.violatedDirective))"


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium (apt-get install chromium)")
    expect.set_options(timeout=PATIENCE)
    async with async_playwright() as playwright:
        arguments = [f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1"]
        arguments += ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        await browser.close()


@pytest.fixture
def open_page(browser: Browser) -> OpenPage:
    """Opens a server's page: `async with open_page(server, "#talk") as page`. `allow` are beginnings of messages on the
    console that a test expects, as of a response that is an error."""

    @contextlib.asynccontextmanager
    async def opened(
        server: Server, view: str = "#talk", allow: tuple[str, ...] = (), host: str = "127.0.0.1", **options: Any
    ) -> AsyncIterator[Page]:
        context = await browser.new_context(**{"viewport": DESKTOP, "reduced_motion": "reduce", **options})
        context.set_default_timeout(PATIENCE)
        page = await context.new_page()
        wrong: list[str] = []
        url = f"http://{host}:{server.port}"
        page.on("console", lambda told: wrong.append(told.text) if told.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(f"uncaught: {error}"))
        page.on("request", lambda asked: wrong.append(f"asked {asked.url}") if not _ours(asked.url, url) else None)
        await page.add_init_script(VIOLATIONS)
        try:
            await page.goto(f"{url}/ui{view}")
            await page.wait_for_selector("html[data-ready]")
            yield page
        finally:
            await context.close()
        assert [each for each in wrong if not each.startswith(allow)] == []

    return opened


def _ours(url: str, origin: str) -> bool:
    return url.startswith((f"{origin}/", "blob:", "data:"))
