"""A server of two models that is killed while its pages stream; the next one has one model, and a full store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from playwright.async_api import Page, expect

from tests.conftest import ROOT, free_port
from tests.ui.browsing import OpenPage
from tests.ui.test_talk import done, parameters, say, texts

if TYPE_CHECKING:
    from tests.conftest import ServeFactory

TINY = ROOT / "tests" / "data" / "conformance" / "tiny"
REFUSED = ("Failed to load resource",)
MARKUP = "<img src=x onerror=alert(1)>"
ONE, OTHER = ({"id": name, "path": str(TINY)} for name in ("one", MARKUP))
LONG = 100_000


async def test_views_say_that_their_server_was_killed_and_go_on_with_the_next_one(
    serve: ServeFactory, open_page: OpenPage
) -> None:
    port = free_port()
    with serve(f"models={json.dumps([ONE, OTHER])}", port=port) as first:
        async with (
            open_page(first, allow=REFUSED) as talk,
            open_page(first, "#look", allow=REFUSED) as look,
            open_page(first, "#watch", allow=REFUSED) as watch,
        ):
            await go_on_with_another_model(talk)
            await names_are_text(watch)
            live = watch.get_by_role("status").filter(has_text="Live")
            await expect(live).to_be_visible()
            await parameters(talk, max_tokens=LONG)
            await talk.fill("#talk-input", "Talk on")
            await talk.keyboard.press("Enter")
            await expect(talk.locator(".message.running .body")).not_to_be_empty()
            await look.get_by_label("Tokens to generate").fill(str(LONG))
            await look.get_by_role("button", name="Look").click()
            letters = look.locator("#view-look .letters .letter")
            await expect(letters.nth(20)).to_be_visible()
            first.kill()
            for page in (talk, look, watch):
                await expect(page.locator("#banner")).to_contain_text("The server cannot be reached.")
            await expect(talk.locator(".message .error")).to_be_visible()
            await expect(look.locator("#view-look .error[role=alert]").last).to_be_visible()
            await expect(live).to_have_count(0)
            await done(talk)
            with serve(f"models={json.dumps([ONE])}", "store.max_bytes=1000", port=port):
                for page in (talk, look, watch):
                    await expect(page.locator("#banner")).to_be_hidden()
                await expect(live).to_be_visible()
                await look.get_by_label("Tokens to generate").fill("3")
                await look.get_by_role("button", name="Look").click()
                await expect(letters).to_have_count(len("ROMEO:\n") + 3)
                await what_is_not_stored_is_kept_in_the_browser(talk)


async def go_on_with_another_model(page: Page) -> None:
    await parameters(page, max_tokens=4)
    picker = page.locator("#model")
    await picker.select_option("one")
    await say(page, "Hello")
    await picker.select_option(MARKUP)
    async with page.expect_request("**/v1/responses") as asked:
        await say(page, "Go on")
    body = json.loads((await asked.value).post_data or "")
    assert (body["model"], len(body["input"]), "previous_response_id" in body) == (MARKUP, 3, False)
    for name, stats in zip(("one", MARKUP), await page.locator(".stats").all_inner_texts(), strict=True):
        assert stats.endswith(f" · {name}")
    shown = await texts(page)
    await page.reload()
    await expect(page.locator(".message")).to_have_count(4)
    assert await texts(page) == shown
    assert await picker.input_value() == MARKUP


async def names_are_text(page: Page) -> None:
    """In the picker, in Watch, and in a response at /docs."""
    await expect(page.get_by_role("table", name="Models").get_by_text(MARKUP)).to_be_visible()
    await page.get_by_role("link", name="API", exact=True).click()
    await page.locator("#listModels > summary").click()
    await page.locator("#listModels").get_by_role("button", name="Send").click()
    await expect(page.locator("#listModels output")).to_contain_text(MARKUP)
    assert await page.locator("img").count() == 0
    await page.go_back()
    await expect(page.locator("#model").locator("option")).to_have_text(["one", MARKUP])
    assert await page.locator("img").count() == 0


async def what_is_not_stored_is_kept_in_the_browser(page: Page) -> None:
    await expect(page.locator("#model")).to_have_value("one")
    await parameters(page, max_tokens=4)
    again = page.get_by_role("button", name="Regenerate")
    await again.nth(1).click()
    await done(page)
    await expect(page.locator(".message")).to_have_count(4)  # the response before is gone: all was sent
    await page.get_by_role("button", name="New conversation").click()
    await say(page, "Not stored")
    await expect(page.locator(".conversations button", has_text="Not stored")).to_contain_text("in this browser")
    shown = await texts(page)
    await page.reload()
    await expect(page.locator(".message")).to_have_count(2)
    assert await texts(page) == shown
    await page.get_by_role("button", name="Delete").click()
    await expect(page.locator(".conversations button", has_text="Not stored")).to_have_count(0)
