"""Measures what the page costs the server: its throughput with three of them open, and with none.

    python -m benchmarks.server.pages                        # five rounds: four minutes
    python -m benchmarks.server.pages --rounds 1 --seconds 5

`bdh-batch serve` with the bundled model has so many streams under way all the time. In one scenario all of them are
plain clients; in the other two are the page's, Talk, and Look with its map of neurons, and a third page, Watch, follows
the server live. They take turns. The server has one core in both, and all clients another, as somebody's browser is not
on the server's machine; the browser yields to the other clients. Figures are the tokens a second of all streams, as the
server counts them, and its processor time for each token. There are none if a page's stream has ended before. Writes
`pages.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import psutil
from playwright.async_api import Browser, Page, async_playwright

from benchmarks.common import figure, ratio
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served

PROMPT = "ROMEO:\n"
GENERATED = "bdh_generation_tokens_total"
LONG = 50_000  # tokens of a page's stream: more than a round has
SHORT = 400  # of a plain client's
OF_PAGES = 2  # streams
SETTLE = 5.0  # seconds, before a round
NICEST = 19
PATIENCE = 120_000.0  # milliseconds, of a page
Figures = dict[str, float]


class Load:
    """Plain clients, each of which has a stream under way."""

    def __init__(self, server: Served, streams: int) -> None:
        self._tasks = [asyncio.create_task(self._again_and_again(server)) for _ in range(streams)]

    async def _again_and_again(self, server: Served) -> None:
        while True:
            await server.ask(prompt=PROMPT, max_tokens=SHORT, temperature=0.8, ignore_eos=True)

    def check(self) -> None:
        """Raises what has ended one of them."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


@asynccontextmanager
async def three_pages(browser: Browser, server: Served) -> AsyncIterator[list[Page]]:
    """Talk and Look, which stream, and Watch."""
    context = await browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE)
    talk, look, watch = [await context.new_page() for _ in range(1 + OF_PAGES)]
    for page, view in ((talk, "talk"), (look, "look"), (watch, "watch")):
        await page.goto(f"{server.url}/ui#{view}")
    await talk.select_option("#talk-mode", "text")
    await talk.get_by_label("max_tokens", exact=True).fill(str(LONG))
    await talk.fill("#talk-input", PROMPT)
    await talk.keyboard.press("Control+Enter")
    await look.get_by_label("Tokens to generate").fill(str(LONG))
    await look.get_by_label("Strongest neurons of a layer").fill("3")
    await look.locator("#view-look").get_by_role("button", name="Look").click()
    streaming = [talk, look]
    for page in streaming:
        await page.locator("section:not([hidden])").get_by_role("button", name="Stop").wait_for()
    yield streaming
    await context.close()


async def measured(server: Served, load: Load, seconds: float) -> Figures:
    """One round's figures."""
    process = psutil.Process(server.pid)
    await asyncio.sleep(SETTLE)
    tokens, used, begun = (await server.metrics())[GENERATED], process.cpu_times(), time.perf_counter()
    await asyncio.sleep(seconds)
    count = (await server.metrics())[GENERATED] - tokens
    took, now = time.perf_counter() - begun, process.cpu_times()
    load.check()
    busy = now.user + now.system - used.user - used.system
    return {"tokens_per_second": count / took, "server_us_per_token": 1e6 * busy / count}


async def rounds(server: Served, browser: Browser, chosen: argparse.Namespace) -> dict[str, list[Figures]]:
    """The figures of every round of both scenarios."""
    found: dict[str, list[Figures]] = {"none": [], "three pages": []}
    for _ in range(chosen.rounds):
        load = Load(server, chosen.streams)
        found["none"].append(await measured(server, load, chosen.seconds))
        await load.end()
        load = Load(server, chosen.streams - OF_PAGES)
        async with three_pages(browser, server) as streaming:
            found["three pages"].append(await measured(server, load, chosen.seconds))
            for page in streaming:
                if not await page.locator("section:not([hidden])").get_by_role("button", name="Stop").is_visible():
                    sys.exit(f"{page.url}: its stream has ended: {await page.locator('main').inner_text()}")
        await load.end()
    return found


async def run(chosen: argparse.Namespace, server: Served) -> dict[str, list[Figures]]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("there is no chromium (apt-get install chromium)")
    async with async_playwright() as playwright:
        before = {each.pid for each in psutil.Process().children(recursive=True)}
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for each in psutil.Process().children(recursive=True):
            if each.pid not in before:
                each.nice(NICEST)
        found = await rounds(server, browser, chosen)
        await browser.close()
    server.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16, help="under way in either scenario")
    parser.add_argument("--seconds", type=float, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < OF_PAGES:
        sys.exit("two cores are needed: one for the server, one for its clients")
    head = report_head(["playwright", "uvicorn", "uvloop", "orjson"], cores=1)
    os.sched_setaffinity(0, cores[:1])
    with served() as server:
        os.sched_setaffinity(0, cores[1:2])
        found = asyncio.run(run(chosen, server))
    figures = {
        name: {
            "tokens_per_second": figure([each["tokens_per_second"] for each in measures], "tokens/s", "higher"),
            "server_us_per_token": figure([each["server_us_per_token"] for each in measures], "µs", "lower"),
        }
        for name, measures in found.items()
    }
    paired = {name: [each["tokens_per_second"] for each in measures] for name, measures in found.items()}
    to_none = ratio(paired["three pages"], paired["none"])
    sizes = {"streams": chosen.streams, "seconds": chosen.seconds, "rounds": chosen.rounds}
    write_report(chosen.out / "pages.json", head | sizes | {"figures": figures, "ratio_to_none": asdict(to_none)})
    for name, each in figures.items():
        print(f"{name:12} " + "  ".join(f"{key} {value['value']:,.1f}" for key, value in each.items()))
    print(f"three pages to none: {to_none.value:.3f} ({to_none.low:.3f} to {to_none.high:.3f})")


if __name__ == "__main__":
    main()
