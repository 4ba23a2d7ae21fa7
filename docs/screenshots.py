"""Makes the pictures of docs/ui.md, from the bundled model and a real browser.

python -m docs.screenshots             # all
python -m docs.screenshots ui-look     # some
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import httpx
from playwright.async_api import Page, async_playwright

DOCS = Path(__file__).parent
START_SECONDS = 600.0
DESKTOP, PHONE = {"width": 1200, "height": 760}, {"width": 360, "height": 740}
WATCHED_SECONDS = 90.0
LOOK = {"width": 1200, "height": 820}
# What each picture is called, and what its browser is like.
PICTURES: dict[str, dict[str, Any]] = {
    "ui-talk": {"viewport": DESKTOP, "color_scheme": "light"},
    "ui-talk-dark": {"viewport": DESKTOP, "color_scheme": "dark"},
    "ui-talk-phone": {"viewport": PHONE, "color_scheme": "light"},
    "ui-look": {"viewport": LOOK, "color_scheme": "light"},
    "ui-watch": {"viewport": DESKTOP, "color_scheme": "light"},
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


async def watch(page: Page) -> None:
    """Looks at a server that some clients use."""

    async def use(client: httpx.AsyncClient, number: int) -> None:
        for turn in count():
            body = {"prompt": f"ROMEO {number}:\n", "max_tokens": 40 + 97 * (turn * number % 4), "seed": turn}
            (await client.post("/v1/completions", json=body)).raise_for_status()
            await asyncio.sleep(number * turn % 5 / 4)

    url = page.url.partition("/ui")[0]
    async with httpx.AsyncClient(base_url=url, timeout=START_SECONDS) as client:
        using = [asyncio.create_task(use(client, number)) for number in range(8)]
        await asyncio.sleep(WATCHED_SECONDS)
        for task in using:
            task.cancel()
        await asyncio.gather(*using, return_exceptions=True)


async def look(page: Page) -> None:
    """Has the model go on, and chooses a token and a neuron of it."""
    view = page.locator("#view-look")
    await view.get_by_label("Text that the model reads").fill("ROMEO:\nWhat light is this, that ")
    await view.get_by_label("Tokens to generate").fill("420")
    await view.get_by_label("Seed").fill("3")
    await view.get_by_role("button", name="Look").click()
    await view.locator(".letter[data-at='440']").wait_for(state="attached")
    await view.get_by_role("button", name="Stop").wait_for(state="hidden")
    await view.locator(".letter[data-at='436']").click()
    layers = view.get_by_role("region", name="Strongest neurons of each layer").locator("tbody tr")
    await layers.nth(4).locator("button").nth(2).click()
    await page.evaluate("document.querySelector('main').scrollTop = 0")


VIEWS = {"talk": talk, "look": look, "watch": watch}


async def pictures(url: str, names: Sequence[str]) -> None:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name in names:
            view = name.split("-")[1]
            context = await browser.new_context(**PICTURES[name])
            context.set_default_timeout(START_SECONDS * 1000)
            page = await context.new_page()
            await page.goto(f"{url}/ui#{view}")
            await page.wait_for_selector("html[data-ready]")
            await VIEWS[view](page)
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
        asyncio.run(pictures(url, sys.argv[1:] or [*PICTURES]))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
