"""Measures what the page costs the server: its throughput with three of them open, and with none.

    python -m benchmarks.server.pages                        # five rounds: seven minutes
    python -m benchmarks.server.pages --rounds 1 --seconds 5

`bdh-batch serve` with the bundled model has streams of plain clients under way all the time. Scenarios take turns:

    none       nothing else
    open       besides, Talk and Look with what they have generated, and Watch, which follows the server and its steps
    streaming  two of the streams are the page's, Talk's, and Look's with its map of neurons; Watch follows the server

A Chromium opens the pages once, and what they ask for is recorded (`recorded.py`); in the rounds a plain client asks
for it at the same moments. The server has one core, and all clients another. Figures are the tokens a second of all
streams, as the server counts them, and its processor time for each token. There are none if a page's stream has ended
before. Writes `pages.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from playwright.async_api import Browser, Page, async_playwright
from tqdm import tqdm

from benchmarks.common import figure, ratio
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served
from benchmarks.server.recorded import Asked, Playing, Recorder

PROMPT = "ROMEO:\n"
GENERATED = "bdh_generation_tokens_total"
LONG = 50_000  # tokens of a page's stream: more than a round has
SHORT = 400  # of a plain client's, and of a page's that ends
OF_PAGES = 2  # streams
TOP = 3  # strongest neurons of a layer
SETTLE = 3.0  # seconds, before a round
NICEST = 19
PATIENCE = 120_000.0  # milliseconds, of a page
NONE, OPEN, STREAMING = "none", "open", "streaming"
Figures = dict[str, float]
Plans = dict[str, list[Asked]]


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


async def record(browser: Browser, server: Served, scenario: str, seconds: float) -> list[Asked]:
    """Has three pages open for a while, and returns what they asked for."""
    context = await browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(PATIENCE)
    talk, look, watch = pages = [await context.new_page() for _ in range(3)]
    recorder = Recorder(pages, server)
    tokens = LONG if scenario == STREAMING else SHORT
    await begin_talk(talk, server, tokens)
    await begin_look(look, server, tokens)
    await watch.goto(f"{server.url}/ui#watch")
    await watch.get_by_role("status").filter(has_text="Live").wait_for()
    if scenario == OPEN:
        await watch.get_by_role("button", name="Follow").click()
        await watch.get_by_role("table", name="In this step").wait_for()
    stops = [page.locator("section:not([hidden])").get_by_role("button", name="Stop") for page in (talk, look)]
    for stop in stops:
        await stop.wait_for(state="visible" if scenario == STREAMING else "hidden")
    since = time.perf_counter()
    await asyncio.sleep(seconds)
    asked = await recorder.asked(since)
    if scenario == STREAMING and not all([await stop.is_visible() for stop in stops]):
        sys.exit("a page's stream has ended")
    await context.close()
    return asked


async def begin_talk(page: Page, server: Served, tokens: int) -> None:
    await page.goto(f"{server.url}/ui#talk")
    await page.select_option("#talk-mode", "text")
    await page.get_by_label("max_tokens", exact=True).fill(str(tokens))
    await page.fill("#talk-input", PROMPT)
    await page.keyboard.press("Control+Enter")
    await page.get_by_role("button", name="Stop").wait_for()


async def begin_look(page: Page, server: Served, tokens: int) -> None:
    await page.goto(f"{server.url}/ui#look")
    view = page.locator("#view-look")
    await page.get_by_label("Tokens to generate").fill(str(tokens))
    await page.get_by_label("Strongest neurons of a layer").fill(str(TOP))
    await view.get_by_role("button", name="Look").click()
    await view.get_by_role("button", name="Stop").wait_for()


async def plans_of(server: Served, streams: int, seconds: float) -> tuple[Plans, str]:
    """What pages ask for in each scenario, with the streams of plain clients beside them; and the browser's version."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("there is no chromium (apt-get install chromium)")
    load, plans = Load(server, streams), Plans({NONE: []})
    async with async_playwright() as playwright:
        before = {each.pid for each in psutil.Process().children(recursive=True)}
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for each in psutil.Process().children(recursive=True):
            if each.pid not in before:
                each.nice(NICEST)
        for scenario in (OPEN, STREAMING):
            plans[scenario] = await record(browser, server, scenario, seconds)
        version = browser.version
        await browser.close()
    await load.end()
    return plans, version


async def measured(server: Served, streams: int, asked: Sequence[Asked], seconds: float) -> Figures:
    """One round's figures."""
    process, load, playing = psutil.Process(server.pid), Load(server, streams), Playing(asked, server.address)
    await asyncio.sleep(SETTLE)
    tokens, used, begun = (await server.metrics())[GENERATED], process.cpu_times(), time.perf_counter()
    await asyncio.sleep(seconds)
    count = (await server.metrics())[GENERATED] - tokens
    took, now = time.perf_counter() - begun, process.cpu_times()
    load.check()
    playing.check()
    await load.end()
    await playing.end()
    busy = now.user + now.system - used.user - used.system
    return {"tokens_per_second": count / took, "server_us_per_token": 1e6 * busy / count}


async def run(chosen: argparse.Namespace, server: Served) -> tuple[Plans, str, dict[str, list[Figures]]]:
    plans, version = await plans_of(server, chosen.streams, SETTLE + chosen.seconds)
    found: dict[str, list[Figures]] = {scenario: [] for scenario in plans}
    for _ in tqdm(range(chosen.rounds), desc="rounds", unit="round"):
        for scenario, asked in plans.items():
            streams = chosen.streams - (OF_PAGES if scenario == STREAMING else 0)
            found[scenario].append(await measured(server, streams, asked, chosen.seconds))
    server.close()
    return plans, version, found


def report(plans: Plans, found: dict[str, list[Figures]]) -> dict[str, Any]:
    """The figures of each scenario, what its pages asked for, and the ratios of the throughput to that of none."""
    figures, ratios = {}, {}
    for scenario, measures in found.items():
        rates = [each["tokens_per_second"] for each in measures]
        costs = [each["server_us_per_token"] for each in measures]
        figures[scenario] = {
            "tokens_per_second": figure(rates, "tokens/s", "higher"),
            "server_us_per_token": figure(costs, "µs", "lower"),
        }
        if scenario != NONE:
            ratios[scenario] = asdict(ratio(rates, [each["tokens_per_second"] for each in found[NONE]]))
    asked = {scenario: Counter(each.what for each in plan) for scenario, plan in plans.items()}
    return {"asked": asked, "figures": figures, "ratio_to_none": ratios}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16, help="under way in every scenario")
    parser.add_argument("--seconds", type=float, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed: one for the server, one for its clients")
    head = report_head(["playwright", "uvicorn", "uvloop", "orjson"], cores=1)
    os.sched_setaffinity(0, cores[:1])
    with served() as server:
        os.sched_setaffinity(0, cores[1:2])
        plans, version, found = asyncio.run(run(chosen, server))
    sizes = {"chromium": version, "streams": chosen.streams, "seconds": chosen.seconds, "rounds": chosen.rounds}
    whole = report(plans, found)
    write_report(chosen.out / "pages.json", head | sizes | whole)
    for name, each in whole["figures"].items():
        print(f"{name:12} " + "  ".join(f"{key} {value['value']:,.1f}" for key, value in each.items()))
    for name, each in whole["ratio_to_none"].items():
        print(f"{name} to none: {each['value']:.3f} ({each['low']:.3f} to {each['high']:.3f})")


if __name__ == "__main__":
    main()
