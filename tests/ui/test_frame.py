"""The page's frame: how it is served, and what it does whatever view it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hatchling.builders.wheel import WheelBuilder
from playwright.async_api import Page, Route, ViewportSize, expect

from bdh_batch.ui.assets import STATIC, assets
from tests.ui.browsing import DESKTOP, PHONE, OpenPage, Scheme, serious

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

ROOT = Path(__file__).parent.parent.parent


def test_browsers_get_the_page_and_programs_json(tiny: Server) -> None:
    page = tiny.http.get("/", headers={"accept": "text/html,*/*;q=0.8"})
    assert page.content == tiny.http.get("/ui").content == assets()["index.html"].content
    assert tiny.http.get("/").json()["status"] == "ready"
    assert "accept" in page.headers["vary"]
    assert tiny.http.get("/ui/").headers["location"] == "../ui"


def test_each_file_is_served_once_and_then_known(tiny: Server) -> None:
    for name, asset in assets().items():
        first = tiny.http.get(f"/ui/{name}")
        assert (first.status_code, first.content) == (200, asset.content)
        again = tiny.http.get(f"/ui/{name}", headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for response in (first, again):
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["cache-control"] == "no-cache"
            assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
            assert "unsafe" not in response.headers["content-security-policy"]
    for unknown in ("none.js", "../assets.py", "%2e%2e/assets.py", "static"):
        tiny.error(tiny.http.get(f"/ui/{unknown}"), 404)


def test_nothing_is_asked_of_other_hosts_and_no_markup_is_made_of_text() -> None:
    for name, asset in assets().items():
        text = asset.content.decode()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import", text), name
        assert ".css" not in name or "url(" not in text, name
        assert len(text.splitlines()) <= 400, name


def test_comes_with_the_wheel() -> None:
    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {f"bdh_batch/ui/{STATIC.name}/{name}" for name in assets()} <= files


def test_can_be_switched_off(serve: ServeFactory) -> None:
    with serve("server.ui=false", "auth.enabled=false", model=ROOT / "tests/data/conformance/tiny") as server:
        server.error(server.http.get("/ui"), 404)
        server.error(server.http.get("/ui/app.js"), 404)
        assert server.http.get("/", headers={"accept": "text/html"}).json()["status"] == "ready"


async def test_themes_and_skip_link_work_by_keyboard(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny, color_scheme="dark") as page:
        background = "getComputedStyle(document.body).backgroundColor"
        dark = await page.evaluate(background)
        await page.keyboard.press("Tab")
        await expect(page.get_by_text("Skip to content")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator("main")).to_be_focused()
        await page.get_by_role("button", name="Theme").focus()
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
        assert await page.evaluate(background) != dark


async def test_a_view_that_is_first_opened_while_the_server_is_gone_is_there(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny, "#toString", allow=("Failed to load resource",)) as page:
        await page.route("**/*", lambda route: route.abort())
        for name in ("Look", "Watch"):
            await page.get_by_role("link", name=name, exact=True).click()
            await expect(page.get_by_role("region", name=name, exact=True).get_by_role("button").first).to_be_attached()


async def test_a_server_that_does_not_answer_is_asked_again(tiny: Server, open_page: OpenPage) -> None:
    asked: list[Route] = []

    async def answer(route: Route) -> None:
        asked.append(route)
        if len(asked) > 1:
            await route.fulfill(body="{}")

    async with open_page(tiny, allow=("Failed to load resource",)) as page:
        await page.route("**/never", answer)
        assert await page.evaluate(
            """async () => {
                const { Connection } = await import("./ui/connection.js");
                const connection = new Connection(new URL("never", location).href, 200);
                const back = new Promise((resolve) => connection.addEventListener("back", () => resolve(true)));
                connection.lost({ status: 0 });
                return Promise.race([back, new Promise((resolve) => setTimeout(resolve, 20000, false))]);
            }"""
        )


async def test_has_no_serious_finding_and_fits_a_phone(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny, bypass_csp=True) as page:
        await page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
        await page.get_by_label("max_tokens", exact=True).fill("4")
        await page.fill("#talk-input", "Hello")
        await page.keyboard.press("Enter")
        await expect(page.locator(".stats")).to_have_count(1)
        await is_accessible(page, "light", PHONE)
        await is_accessible(page, "dark", DESKTOP)


async def is_accessible(page: Page, scheme: Scheme, size: ViewportSize) -> None:
    await page.set_viewport_size(size)
    assert await page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert await serious(page, scheme) == []
    await page.get_by_role("button", name="API key").click()
    assert await serious(page, scheme) == []
    await page.keyboard.press("Escape")
    await expect(page.get_by_role("dialog")).to_be_hidden()
