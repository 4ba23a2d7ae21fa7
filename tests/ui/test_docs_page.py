"""The page of the API: forms whose fields are made of the OpenAPI document, and requests that are sent from them."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from playwright.async_api import Route, expect

from tests.ui.browsing import PHONE, OpenPage, serious

if TYPE_CHECKING:
    from tests.conftest import Server

CLOSE = "for (const each of document.querySelectorAll('details:not([open]) > :not(summary)')) each.remove()"


async def late(route: Route) -> None:
    await asyncio.sleep(0.3)
    await route.continue_()


async def test_a_form_asks_for_what_its_fields_say(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny) as page:
        await page.get_by_role("link", name="API", exact=True).click()
        await page.get_by_role("searchbox", name="Find").fill("complete text")
        await expect(page.get_by_text("/v1/chat/completions", exact=True)).not_to_be_visible()
        form = page.locator("#createCompletion form")
        await page.locator("#createCompletion > summary").click()
        await page.route("**/openapi.json", late)
        for _ in range(3):
            await form.get_by_text("Fields").click()
        await form.get_by_role("textbox", name="prompt *", exact=True).fill("What?")
        await form.get_by_role("spinbutton", name="max_tokens", exact=True).fill("3")
        await form.get_by_role("combobox", name="ignore_eos", exact=True).select_option("true")
        await form.get_by_role("textbox", name="model", exact=True).fill("")  # that of the example is not here
        await form.get_by_role("textbox", name="prompt *", exact=True).focus()
        body = json.loads(await form.get_by_role("textbox", name="Body").input_value())
        assert body == {"prompt": "What?", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
        await form.get_by_role("button", name="Send").click()
        await expect(form.locator("output")).to_contain_text("200")
        await expect(form.locator("output")).to_contain_text('"completion_tokens": 3')
        await form.get_by_role("button", name="stream").click()
        await form.get_by_role("button", name="Send").click()
        await expect(form.locator("output")).to_contain_text("data: [DONE]")
        await page.get_by_role("searchbox", name="Find").fill("neurons of a model")
        await page.locator("#getNeurons > summary").click()
        form = page.locator("#getNeurons form")
        await form.get_by_label("model", exact=True).fill("minute")  # an alias
        await form.get_by_role("button", name="Send").click()
        await expect(form.locator("output")).to_contain_text('"neurons_per_head": 128')
        await page.get_by_role("searchbox", name="Find").fill("versions/{version}")
        form = page.locator("form[data-path$='/versions/{version}']").first
        await page.locator("details", has=form).last.locator("> summary").click()
        await form.get_by_label("id", exact=True).fill("tiny")
        await form.get_by_role("button", name="Send").click()
        await expect(form.locator("output")).to_contain_text('"versions"')


async def test_fits_a_phone_and_has_no_serious_finding(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny, viewport=PHONE, bypass_csp=True) as page:
        await page.get_by_role("link", name="API", exact=True).click()
        await page.locator("#createCompletion > summary").click()
        await page.locator("#createCompletion").get_by_text("Fields").click()
        await expect(page.get_by_text("max_tokens", exact=True).first).to_be_visible()
        assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        # What is in a closed element is found by looking for text, so it is there, and axe takes it for seen.
        await page.evaluate(CLOSE)
        assert await serious(page, "light") == []
        assert await serious(page, "dark") == []
