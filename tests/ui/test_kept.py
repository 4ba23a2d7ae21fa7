"""Conversations that the server keeps: what is asked for them, and that they are opened and deleted whole."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from playwright.async_api import Page, Request, Route, expect

from tests.ui.browsing import OpenPage
from tests.ui.test_talk import REFUSED, conversation, done, parameters, say, texts

if TYPE_CHECKING:
    from tests.conftest import Server


async def fewer_listed(route: Route) -> None:
    """The list of what the server keeps ends after two responses."""
    text = (await (await route.fetch()).body()).decode()
    assert "const PAGES = 5;" in text
    assert "const PAGE = 100;" in text
    text = text.replace("const PAGES = 5;", "const PAGES = 1;").replace("const PAGE = 100;", "const PAGE = 2;")
    await route.fulfill(body=text, content_type="text/javascript")


async def test_the_server_keeps_chats_and_a_branch_is_a_fork_of_a_response(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny) as page:
        sent: list[Any] = []
        fetched: list[str] = []

        def note(asked: Request) -> None:
            if asked.method == "POST":
                sent.append(asked.post_data_json)
            elif "/v1/responses" in asked.url:
                fetched.append(asked.url.partition("/v1/responses")[2])

        page.on("request", note)
        await parameters(page, max_tokens=8, seed=1)
        await say(page, "First")
        await say(page, "Second")
        await page.get_by_role("button", name="Branch here").first.click()
        await say(page, "Another second")
        assert fetched == []  # the list was asked for once: what was said since is known
        first, second, third = (each for each in sent if "input" in each)
        assert "previous_response_id" not in first
        assert second["previous_response_id"] == third["previous_response_id"] == second["metadata"]["earlier"]
        assert third["metadata"]["earlier"] not in (None, second["metadata"]["earlier"])
        assert (first["max_output_tokens"], first["seed"], third["input"]) == (8, 1, "Another second")
        assert "cached" in await page.locator(".stats").last.inner_text()
        shown, asked = await texts(page), await curls(page)
        stats = await page.locator(".stats").all_inner_texts()
        entry = page.locator(".conversations button", has_text="First")
        await expect(entry).to_contain_text("kept by the server")
        assert (
            await page.evaluate("Object.keys(localStorage).filter(name => name.startsWith('bdh-conversation-'))") == []
        )
        fetched.clear()
        await page.reload()  # its address names the conversation
        await expect(page.locator(".message")).to_have_count(4)
        assert (await texts(page), await curls(page)) == (shown, asked)
        timeless = [re.sub(r"([\d.]+ tokens/s · )?TTFT \d+ ms · ", "", each) for each in stats]
        assert await page.locator(".stats").all_inner_texts() == timeless
        assert "seed 1" in timeless[0]
        assert len(fetched) == 1 + 2 * 2  # the list, and for the end of each branch its response and its items
        await page.get_by_role("button", name="Branch before").click()
        assert (await texts(page))[2] == "Second"
        await page.get_by_role("button", name="Edit").first.click()
        await page.get_by_label("Edit the message").fill("Other words")
        await parameters(page, stop="x" * 600)  # more than metadata may have
        await page.get_by_role("button", name="Send as a new branch").click()
        await done(page)
        assert len(await texts(page)) == 2
        nodes = (await conversation(page))["nodes"]
        assert [node["text"] for node in nodes if node["parent"] is None] == ["First", "Other words"]
        await expect(page.get_by_role("button", name="Copy as curl")).to_be_enabled()
        await delete_all(page, tiny)


async def curls(page: Page) -> list[str]:
    """What *curl* shows of each response."""
    found = []
    for each in await page.get_by_role("button", name="Copy as curl").all():
        await each.click()
        found.append(await page.locator("dialog pre").inner_text())
        await page.keyboard.press("Escape")
    return found


async def delete_all(page: Page, server: Server) -> None:
    """Deletes the conversation from a page that lists only one of its responses, of which it has then shown all."""
    before = (await conversation(page))["nodes"]
    other = server.http.post("/v1/responses", json={"input": "a", "max_output_tokens": 1}).json()
    await page.route("**/talk/kept.js", fewer_listed)
    await page.reload()
    entry = page.locator(".conversations button", has_text="First")
    await expect(entry).to_have_attribute("aria-current", "true")
    after = (await conversation(page))["nodes"]
    assert [(each["author"], each["text"]) for each in after] == [(each["author"], each["text"]) for each in before]
    for name in ("Copy as curl", "Copy as Python"):
        await expect(page.get_by_role("button", name=name)).to_be_disabled()
    await page.get_by_role("button", name="Show older").click()
    await page.get_by_role("button", name="Delete").click()
    await expect(entry).to_have_count(0)
    for node in before:
        if node["author"] == "model":
            server.error(server.http.get(f"/v1/responses/{node['responseId']}"), 404)
    assert server.http.delete(f"/v1/responses/{other['id']}").status_code == 200


async def test_a_conversation_that_the_server_does_not_delete_stays(tiny: Server, open_page: OpenPage) -> None:
    async def refuse(route: Route) -> None:
        await (route.abort() if route.request.method == "DELETE" else route.continue_())

    async with open_page(tiny, allow=REFUSED) as page:
        await parameters(page, max_tokens=4)
        await say(page, "Away with this")
        await page.route("**/v1/responses/*", refuse)
        await page.get_by_role("button", name="Delete").click()
        await expect(page.locator(".middle > .error")).to_contain_text("The server cannot be reached.")
        await expect(page.locator(".message")).to_have_count(2)
        await page.unroute("**/v1/responses/*")
        await page.get_by_role("button", name="Delete").click()
        await expect(page.locator(".message")).to_have_count(0)
        await expect(page.locator(".conversations button", has_text="Away with this")).to_have_count(0)
