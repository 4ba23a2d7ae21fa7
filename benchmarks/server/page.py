"""Measures the page: whether it responds while a long text streams to its map of neurons, and what it keeps of it.

    python -m benchmarks.server.page                      # 50,000 tokens at 1,000 a second, twice: two minutes
    python -m benchmarks.server.page --tokens 5000 --runs 1

A server that makes so many tokens a second (`paced.py`) streams to the Look view of a Chromium without a window, with
neurons and log-probabilities. Meanwhile somebody types, points, clicks and goes from token to token, a few times a
second. For every event there are two times: `input_delay`, from when it happened until the page's first listener runs,
and `paint_delay`, until the frame after it has been drawn. Both runs are of one page: `heap_mb` is what its JavaScript
heap and its buffers take before the first and after each, once garbage has been collected; what grew from the first run
to the second would grow for ever. There are no figures if a token does not arrive. Writes `page.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playwright.async_api import CDPSession, Locator, Page, async_playwright

from benchmarks.common import figure
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served

PROMPT = "Go"
TOP = 3  # strongest neurons of a layer: a response may contain 2^20
ROOM = 2**21  # of neurons in one response, for more tokens than fit that
SECONDS_BETWEEN = 0.15  # of somebody's doings, at the least
PATIENCE = 120_000.0  # milliseconds
GIVEN_UP = 3.0  # times as long as a stream should take
WATCH = """
  const seen = window.seen = [];
  for (const kind of ["keydown", "pointerdown", "pointerup", "click", "input"]) {
    addEventListener(kind, (event) => {
      const delay = performance.now() - event.timeStamp;
      requestAnimationFrame(() => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = () => seen.push([delay, performance.now() - event.timeStamp]);
        port2.postMessage(null);
      });
    }, { capture: true });
  }
"""


async def main_of(chosen: argparse.Namespace, server: Served) -> dict[str, Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("there is no chromium (apt-get install chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        version = browser.version
        page = await browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(PATIENCE)
        await page.add_init_script(WATCH)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        await page.goto(f"{server.url}/ui#look")
        looked = Looked(page, await page.context.new_cdp_session(page), chosen.tokens)
        await looked.prepare()
        heaps, runs = [await looked.heap()], []
        for _ in range(chosen.runs):
            runs.append(await looked.run(chosen.tokens / chosen.rate))
            heaps.append(await looked.heap())
        await browser.close()
    if problems:
        sys.exit(f"the page failed: {problems[0]}")
    return summary(runs, heaps) | {"chromium": version}


class Looked:
    """The Look view, and somebody who uses it."""

    def __init__(self, page: Page, cdp: CDPSession, tokens: int) -> None:
        self._page = page
        self._cdp = cdp
        self._tokens = tokens
        self._chance = random.Random(0)
        self._view = page.locator("#view-look")
        self._run = self._view.get_by_role("button", name="Look")

    async def prepare(self) -> None:
        for label, value in (
            ("Text that the model reads", PROMPT),
            ("Tokens to generate", str(self._tokens)),
            ("Strongest neurons of a layer", str(TOP)),
        ):
            await self._view.get_by_label(label).fill(value)

    async def run(self, expected: float) -> dict[str, Any]:
        """The times of one stream, in milliseconds, and its tokens a second."""
        await self._page.evaluate("seen.length = 0")
        begun = time.perf_counter()
        await self._run.click()
        stop = self._view.get_by_role("button", name="Stop")
        await stop.wait_for()
        doings = 0
        while await stop.is_visible():
            if time.perf_counter() - begun > GIVEN_UP * expected + 60:
                sys.exit("the stream does not end")
            await self._do()
            doings += 1
            await asyncio.sleep(SECONDS_BETWEEN)
        seconds = time.perf_counter() - begun
        got = await self._view.get_by_text("tokens", exact=False).filter(has_text=f"{self._all:,} tokens").count()
        if not got:
            sys.exit(f"there should be {self._all:,} tokens: {await self._view.locator('form').inner_text()}")
        seen = await self._page.evaluate("seen")
        return {"delays": seen, "doings": doings, "tokens_per_second": self._tokens / seconds}

    async def heap(self) -> float:
        """MiB of the JavaScript heap and its buffers, without garbage."""
        await self._cdp.send("HeapProfiler.collectGarbage")
        usage = await self._cdp.send("Runtime.getHeapUsage")
        taken: float = round((usage["usedSize"] + usage.get("backingStorageSize", 0)) / 2**20, 2)
        return taken

    @property
    def _all(self) -> int:
        return self._tokens + len(PROMPT)

    async def _do(self) -> None:
        """What somebody does: each by the same chance."""
        await self._chance.choice((self._type, self._walk, self._point, self._live))()

    async def _type(self) -> None:
        await self._view.get_by_label("Seed").press_sequentially("7")
        await self._page.keyboard.press("Backspace")

    async def _walk(self) -> None:
        await self._view.locator(".letters").focus()
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft"):
            await self._page.keyboard.press(key)

    async def _point(self) -> None:
        letters = await self._box(self._view.locator(".letters"))
        for _ in range(3):
            x = letters["x"] + self._chance.uniform(0, 0.9) * letters["width"]
            y = letters["y"] + self._chance.uniform(0.05, 0.9) * letters["height"]
            await self._page.mouse.move(x, y)
        await self._page.mouse.click(x, y)

    async def _live(self) -> None:
        live = self._view.get_by_role("button", name="Live again")
        if await live.is_visible():
            await live.click()

    async def _box(self, locator: Locator) -> dict[str, float]:
        await locator.scroll_into_view_if_needed()
        box = await locator.bounding_box()
        assert box is not None
        return {"x": box["x"], "y": box["y"], "width": box["width"], "height": box["height"]}


def summary(runs: Sequence[dict[str, Any]], heaps: Sequence[float]) -> dict[str, Any]:
    """What is reported of all runs."""
    found: dict[str, Any] = {}
    for at, name in enumerate(("input_delay", "paint_delay")):
        rounds = [[each[at] for each in run["delays"]] for run in runs]
        for share in (50, 95, 99):
            found[f"{name}_p{share}"] = figure([percentile(each, share) for each in rounds], "ms", "lower")
        found[f"{name}_most"] = figure([max(each) for each in rounds], "ms", "lower")
    found["tokens_per_second"] = figure([run["tokens_per_second"] for run in runs], "tokens/s", "higher")
    return {
        "figures": {"look": found},
        "events": sum(len(run["delays"]) for run in runs),
        "heap_mb": {"before": heaps[0], "after": list(heaps[1:])},
    }


def percentile(values: Sequence[float], share: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[share - 1], 2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000, help="of each stream")
    parser.add_argument("--rate", type=float, default=1000, help="tokens a second")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(arguments)
    head = report_head(["playwright", "uvicorn", "uvloop", "orjson"])
    module = ("benchmarks.server.paced", "--rate", str(chosen.rate))
    with served(f"limits.max_neurons={ROOM}", module=module) as server:
        found = asyncio.run(main_of(chosen, server))
    sizes = {"tokens": chosen.tokens, "rate": chosen.rate, "runs": chosen.runs, "top": TOP}
    write_report(chosen.out / "page.json", head | sizes | found)
    for name, each in found["figures"]["look"].items():
        print(f"{name:20} {each['value']:,.1f} {each['unit']}")
    print(f"heap, MiB: {found['heap_mb']}; {found['events']} events")


if __name__ == "__main__":
    main()
