"""Makes the pictures of docs/ui.md, from the bundled model and a real browser: `python -m docs.screenshots`."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Page, async_playwright

DOCS = Path(__file__).parent
START_SECONDS = 600.0
DESKTOP, PHONE = {"width": 1200, "height": 760}, {"width": 360, "height": 740}
# What each picture is called, and what its browser is like.
PICTURES: dict[str, dict[str, Any]] = {
    "ui-talk": {"viewport": DESKTOP, "color_scheme": "light"},
    "ui-talk-dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "ui-talk-phone": {"viewport": PHONE, "color_scheme": "light"},
}


async def talk(page: Page) -> None:
    """Has a conversation."""
    if await page.locator("summary", has_text="Parameters").is_visible():
        await page.evaluate("document.querySelectorAll('.side').forEach((side) => { side.open = true; })")
    await page.get_by_label("max_tokens", exact=True).fill("160")
    await page.get_by_label("seed", exact=True).fill("5")
    await page.evaluate(
        "document.querySelectorAll('.side').forEach((side) => { side.open = innerWidth > 900; side.scrollTop = 0; })"
    )
    for turn, text in enumerate(("Who is there?", "Speak again!")):
        await page.fill("#talk-input", text)
        await page.keyboard.press("Enter")
        await page.locator(".message.model .stats").nth(turn).wait_for()
    await page.evaluate("document.activeElement.blur()")


async def pictures(url: str) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, options in PICTURES.items():
            context = await browser.new_context(**options)
            context.set_default_timeout(START_SECONDS * 1000)
            page = await context.new_page()
            await page.goto(f"{url}/ui#talk")
            await page.wait_for_selector("html[data-ready]")
            await talk(page)
            await page.screenshot(path=DOCS / f"{name}.png")
            await context.close()
        await browser.close()


def wait_until_ready(url: str) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit("the server did not start")


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "bdh_batch", "serve", "--port", str(port)])
    try:
        wait_until_ready(url)
        asyncio.run(pictures(url))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
