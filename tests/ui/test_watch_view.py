"""The page's view of the server: what it has done, what it does, models that come and go, and the scheduler's steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from playwright.async_api import Page, expect

from bdh_batch.http.auth.keys import KeyFile, new_key
from bdh_batch.http.watch.endpoints import STEP
from tests.conftest import HANG_SECONDS
from tests.ui.browsing import PHONE, OpenPage, serious

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

MODELS = Path(__file__).parent.parent / "data" / "conformance"
MARKUP = "<img/src=x/onerror=alert(1)>"
LONG = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "stream": True, "model": "tiny"}
SEEN = """(state) => {
    Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
}"""
UNAUTHORIZED = ("Failed to load resource: the server responded with a status of 401",)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys")


@pytest.fixture(scope="module")
def operator(file: KeyFile) -> str:
    return file.add(lambda sha256: new_key(sha256, MARKUP, {"operator": True, "tokens_per_minute": 10_000_000}))


@pytest.fixture(scope="module")
def user(file: KeyFile) -> str:
    return file.add(lambda sha256: new_key(sha256, "user", {}))


@pytest.fixture(scope="module")
def watched(serve: ServeFactory, file: KeyFile, operator: str, user: str) -> Iterator[Server]:
    """Of two models, and for each of them an engine process that runs one sequence at a time."""
    models = f"[{{id: tiny, path: {MODELS / 'tiny'}}}, {{id: odd, path: {MODELS / 'odd-sizes'}, load: on_demand}}]"
    options = (f"models={models}", "auth.enabled=true", f"auth.api_keys_file={file.path}", "scheduler.max_running=1")
    with serve(*options, cutting=True) as server:
        yield server


@contextlib.asynccontextmanager
async def busy(server: Server, key: str) -> AsyncIterator[None]:
    """Meanwhile one stream runs, and one waits; their ids are markup."""

    async def read(number: int) -> None:
        headers = {"authorization": f"Bearer {key}", "x-request-id": f"{MARKUP}{number}"}
        async with httpx.AsyncClient(base_url=server.url, timeout=HANG_SECONDS) as client:
            while True:  # again, should the test take longer
                async with client.stream("POST", "/v1/completions", json=LONG, headers=headers) as response:
                    async for _ in response.aiter_bytes():
                        pass

    streams = [asyncio.create_task(read(number)) for number in range(2)]
    try:
        yield
    finally:
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


async def give_key(page: Page, key: str) -> None:
    await page.locator("#key-input").fill(key)
    await page.get_by_role("button", name="Use this key").click()


async def test_an_operator_watches_models_and_steps(
    watched: Server, operator: str, file: KeyFile, open_page: OpenPage
) -> None:
    """Names and ids that are markup are shown as text: an image of theirs would be asked for, which fails the test."""
    async with open_page(watched, "#watch", allow=UNAUTHORIZED) as page:
        async with busy(watched, operator):
            await steps_are_shown(page, operator)
        await load_and_unload(page)


async def steps_are_shown(page: Page, key: str) -> None:
    await give_key(page, key)
    await expect(page.get_by_role("status").filter(has_text="Live")).to_be_visible()
    await expect(page.get_by_text("1 of 1 slots")).to_be_visible()
    await expect(page.locator(".figures div").filter(has_text="Waiting")).to_contain_text("1")
    await expect(page.get_by_text("tokens/s").first).not_to_have_text("0 tokens/s")
    tenants = page.get_by_role("table", name="Tenants and keys")
    row = tenants.get_by_role("row").filter(has_text=MARKUP)
    await expect(row).to_contain_text("of 10,000,000 tokens")
    await expect(page.get_by_role("table", name="Engine processes")).to_contain_text("ready")

    await page.get_by_label("Steps", exact=True).select_option("16")
    await page.get_by_role("button", name="Record").click()
    await expect(page.get_by_text("16 steps of engine-0-0")).to_be_visible()
    await expect(page.get_by_role("table", name="In this step")).to_contain_text(f"{MARKUP}")
    await expect(page.get_by_role("table", name="Waiting")).to_contain_text("as many as may hold a state")
    summary = page.get_by_text("slots are held")
    first = await summary.text_content()
    await page.get_by_role("slider", name="Step").focus()
    await page.keyboard.press("ArrowRight")
    assert await summary.text_content() != first

    await page.get_by_role("button", name="Pause").click()
    figures = page.locator(".figures")
    paused = await figures.text_content()
    await page.get_by_text("in numbers").click()
    await page.evaluate("new Promise((resolve) => setTimeout(resolve, 2500))")  # more than a sample
    assert await figures.text_content() == paused
    await page.get_by_role("button", name="Go on").click()
    await expect(page.get_by_role("table", name="Minute by minute").get_by_role("row").nth(1)).to_be_visible()


async def load_and_unload(page: Page) -> None:
    models = page.get_by_role("table", name="Models")
    odd = models.get_by_role("row").filter(has_text="odd")
    state = odd.get_by_role("cell").first
    await models.get_by_role("button", name="Load odd").press("Enter")
    await expect(state).to_have_text("loaded")
    await expect(odd).not_to_contain_text("…")  # until the response has come, another press does nothing
    await models.get_by_role("button", name="Unload odd").press("Enter")
    await expect(state).to_have_text("unloaded")


async def test_other_keys_see_figures_and_revoked_ones_are_asked_again(
    watched: Server, user: str, file: KeyFile, open_page: OpenPage
) -> None:
    async with open_page(watched, "#watch", allow=UNAUTHORIZED) as page:
        await give_key(page, user)
        await expect(page.get_by_role("status").filter(has_text="Live")).to_be_visible()
        await expect(page.get_by_text("An operator's key also shows")).to_be_visible()
        await expect(page.get_by_role("table", name="Tenants and keys")).not_to_be_visible()
        file.revoke("user")
        await expect(page.get_by_text("Incorrect API key provided.").first).to_be_visible()
        await expect(page.locator("#key-input")).to_be_focused()


async def test_requests_that_have_one_id_are_each_shown(tiny: Server, open_page: OpenPage) -> None:
    step = STEP | {"sequences": STEP["sequences"] * 2, "waiting": STEP["waiting"] * 3}
    async with open_page(tiny, "#watch") as page:
        recorded = {"model": "tiny", "engines": [{"process": "server", "steps": [step]}]}
        await page.route("**/watch/steps?*", lambda route: route.fulfill(json=recorded))
        await page.get_by_role("button", name="Record").click()
        for name, count in (("In this step", 2), ("Waiting", 3)):
            await expect(page.get_by_role("table", name=name).locator("tbody tr")).to_have_count(count)
        recorded["engines"] = []  # as on Ray
        await page.get_by_role("button", name="Record").click()
        await expect(page.get_by_text("none of this model's engines records them")).to_be_visible()


async def test_nothing_is_asked_for_while_nobody_sees_it(tiny: Server, open_page: OpenPage) -> None:
    """A browser without a window shows all its tabs: whether they are seen is said for it."""
    async with open_page(tiny, "#watch") as page:
        await page.clock.install()
        recorded = {"model": "tiny", "engines": [{"process": "server", "steps": [STEP]}]}
        await page.route("**/watch/steps?*", lambda route: route.fulfill(json=recorded))
        await expect(page.get_by_role("status").filter(has_text="Live")).to_be_visible()
        await page.get_by_role("button", name="Follow").click()
        await expect(page.get_by_role("table", name="In this step")).to_be_visible()
        async with page.expect_event("requestfailed", lambda request: "watch/stream" in request.url):
            await page.evaluate(SEEN, "hidden")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.clock.run_for(60_000)
        assert asked == []
        async with page.expect_request("**/watch/stream?since=*") as again:
            await page.evaluate(SEEN, "visible")
        assert float((await again.value).url.partition("since=")[2]) > 0
        async with page.expect_request("**/watch/steps?*"):
            await page.clock.run_for(2_000)


async def test_fits_a_phone_and_has_no_serious_finding(tiny: Server, open_page: OpenPage) -> None:
    """Without keys, the programs of the server's machine are operators."""
    async with open_page(tiny, "#watch", viewport=PHONE, bypass_csp=True) as page:
        await page.get_by_text("in numbers").click()
        await expect(page.get_by_role("table", name="Models")).to_be_visible()
        assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert await serious(page, "light") == []
        assert await serious(page, "dark") == []


async def test_holds_fifteen_minutes_and_no_more(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny, "#talk") as page:
        found = await page.evaluate(
            """async () => {
                const { Samples } = await import("./ui/watch/samples.js");
                const samples = new Samples();
                const sample = (time) => ({
                    time, generated: 2, prompt: 0, running: 1, waiting: 0, occupancy: null,
                    first_token: [1, 2, 3], between_tokens: null, rejections: { queue_full: 1 },
                });
                for (let time = 2; time <= 4000; time += 2) samples.add(sample(time));
                const again = samples.add(sample(4000));
                const { length } = samples.list;
                const minutes = samples.minutes();
                const total = samples.total("rejections");
                samples.add(sample(10));
                return { length, again, minutes: minutes.length, row: minutes[1], total, after: samples.list.length };
            }"""
        )
    row = {"generated": 2, "prompt": 0, "running": 1, "waiting": 0, "occupancy": None, "first_token": 2}
    assert found["row"].items() >= (row | {"between_tokens": None, "rejections": 30}).items()
    assert (found["length"], found["again"], found["minutes"], found["after"]) == (450, False, 16, 1)
    assert found["total"] == {"queue_full": 450}
