"""Talk: what a person does there, in a real browser against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import Page, expect

from tests.conftest import ROOT, clean_environment, eventually
from tests.ui.browsing import ELSEWHERE, OpenPage

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = ROOT / "tests" / "data" / "conformance" / "tiny"
REFUSED = ("Failed to load resource",)  # what Chromium logs of every response that is an error
MARKUP = '<img src=x onerror="window.hurt=1"><script>window.hurt=1</script>&lt;b&gt;\'"</textarea>'


async def parameters(page: Page, **values: object) -> None:
    for name, value in values.items():
        await page.get_by_label(name, exact=True).fill(str(value))


async def say(page: Page, text: str) -> None:
    """Sends it, and waits until the answer is complete."""
    complete = page.locator(".message.model .stats")
    before = await complete.count()
    await page.fill("#talk-input", text)
    await page.keyboard.press("Control+Enter")
    await expect(complete).to_have_count(before + 1)
    await done(page)


async def done(page: Page) -> None:
    await expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    await expect(page.locator(".message.running")).to_have_count(0)


async def texts(page: Page) -> list[str]:
    return [
        str(each) for each in await page.locator(".message .body").evaluate_all("all => all.map(e => e.textContent)")
    ]


async def conversation(page: Page) -> dict[str, Any]:
    """What the export has."""
    async with page.expect_download() as coming:
        await page.get_by_role("button", name="Export JSON").click()
    return loaded(await (await coming.value).path())


def exported(file: Path) -> str:
    return file.read_text()


def loaded(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def printed(*command: str) -> str:
    """What a program of a user prints."""
    environment = clean_environment() | {"PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300).stdout


async def unfold(page: Page) -> None:
    for each in await page.locator(".parameters details:not([open]) summary").all():
        await each.click()


async def tab_to(page: Page, name: str, key: str = "Tab") -> None:
    """Presses a key until the element of that name has the focus."""
    for _ in range(150):
        await page.keyboard.press(key)
        focused = (
            "(e => e.getAttribute('aria-label') ?? e.labels?.[0]?.textContent ?? e.textContent)(document.activeElement)"
        )
        if await page.evaluate(focused) == name:
            return
    pytest.fail(f"{name} cannot be reached by keyboard")


async def test_a_conversation_needs_a_keyboard_only(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny) as page:
        await tab_to(page, "max_tokens")
        await page.keyboard.type("8")
        await tab_to(page, "Message", "Shift+Tab")
        await page.keyboard.type("Who is there?")
        await page.keyboard.press("Enter")
        await expect(page.locator(".stats")).to_have_count(1)
        assert len(await texts(page)) == 2
        await tab_to(page, "Regenerate", "Shift+Tab")
        await page.keyboard.press("Enter")
        await expect(page.locator(".message.model .switch")).to_have_text("‹ 2 / 2 ›")
        await tab_to(page, "Branch before")
        await page.keyboard.press("Enter")
        await expect(page.locator(".message.model .switch")).to_have_text("‹ 1 / 2 ›")
        await expect(page.get_by_role("status")).to_contain_text("Done: 8 tokens")
        await tab_to(page, "Edit", "Shift+Tab")
        await page.keyboard.press("Enter")
        await page.keyboard.type(" And here?")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator(".message.user .switch")).to_have_text("‹ 2 / 2 ›")
        await done(page)
        assert (await texts(page))[0] == "Who is there? And here?"
        await tab_to(page, "max_tokens")
        await page.keyboard.type("100000")  # in place of what is there, which is selected
        await tab_to(page, "Message", "Shift+Tab")
        await page.keyboard.type("Talk on")
        await page.keyboard.press("Enter")
        await expect(page.locator(".message.running .body")).not_to_be_empty()
        await tab_to(page, "Stop")
        await page.keyboard.press("Enter")
        await done(page)
        await expect(page.get_by_label("Message", exact=True)).to_be_focused()
        await expect(page.locator(".stats").last).to_contain_text("stopped")
        await tab_to(page, "Export text")
        async with page.expect_download() as coming:
            await page.keyboard.press("Enter")
        assert "### You\n\nWho is there? And here?\n" in exported(await (await coming.value).path())
        await tab_to(page, "Copy as curl", "Shift+Tab")
        await page.keyboard.press("Enter")
        await tab_to(page, "Copy")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("dialog").get_by_role("button", name="Copied")).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(page.get_by_role("button", name="Copy as curl").last).to_be_focused()


async def test_text_goes_on_and_is_kept_in_the_browser(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny) as page:
        await page.get_by_label("Mode", exact=True).select_option("text")
        await parameters(page, max_tokens=8, temperature=0)
        await say(page, "Once upon")
        begun = "".join(await texts(page))
        async with page.expect_request("**/v1/completions") as asked:
            await say(page, "")
        assert json.loads((await asked.value).post_data or "")["prompt"] == begun
        expected = tiny.text(prompt="Once upon", max_tokens=8, temperature=0)
        assert begun == "Once upon" + expected
        whole = await texts(page)
        await page.reload()
        await page.locator(".conversations button", has_text="kept in this browser").click()
        await expect(page.locator(".message")).to_have_count(3)
        assert await texts(page) == whole


async def test_a_stream_can_be_stopped(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny) as page:
        await parameters(page, max_tokens=100000)
        await page.fill("#talk-input", "Talk on")
        await page.keyboard.press("Enter")
        await expect(page.locator(".message.model .body")).not_to_be_empty()
        await expect(page.get_by_role("button", name="Delete")).to_be_disabled()
        await page.keyboard.press("Escape")
        await done(page)
        await expect(page.locator(".stats")).to_contain_text("stopped")
        tiny.until_idle()
        await expect(page.locator(".conversations button", has_text="Talk on")).to_contain_text("in this browser")


async def test_parameters_are_those_of_the_document_and_wrong_ones_are_named(tiny: Server, open_page: OpenPage) -> None:
    known = tiny.http.get("/openapi.json").json()["components"]["schemas"]["ChatBody"]["properties"]
    async with open_page(tiny, allow=REFUSED) as page:
        shown = await page.locator(".parameter label code").all_text_contents()
        assert set(shown) <= known.keys()
        assert {"temperature", "min_p", "logit_bias", "bad_words", "ignore_eos", "latent_steps"} <= set(shown)
        help_text = known["top_p"]["description"]
        await expect(page.get_by_text(f"{help_text} (from 0 to 1; default 1)")).to_be_visible()
        temperature = page.get_by_label("temperature", exact=True)
        for wrong, said in (("hot", "temperature should be a number"), ("3", "temperature")):
            await temperature.fill(wrong)
            await page.fill("#talk-input", "Hello")
            await page.get_by_role("button", name="Send").click()
            await expect(page.locator(".middle > .error")).to_contain_text(said)
            await expect(temperature).to_be_focused()
            assert await temperature.get_attribute("aria-invalid") == "true"
        await temperature.fill("1")
        await parameters(page, max_tokens=4)
        await unfold(page)
        await parameters(page, logit_bias='{"65": 100}', bad_words="b\nc")
        await page.get_by_label("Structured output", exact=True).select_option("regex")
        await page.get_by_label("What the structured output has to look like").fill("[A-C]{3}")
        await say(page, "Hello")
        assert (await texts(page))[-1] == "AAA"


async def test_requests_can_be_copied_as_curl_and_python(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny) as page:
        await parameters(page, max_tokens=6, seed=3)
        await page.get_by_label("Structured output", exact=True).select_option("regex")
        await page.get_by_label("What the structured output has to look like").fill("[a-z' ]{6}")
        await say(page, 'It\'s "so"')
        answer = (await texts(page))[-1]
        copied = {}
        for name in ("curl", "Python"):
            await page.get_by_role("button", name=f"Copy as {name}").click()
            copied[name] = await page.locator("dialog pre").inner_text()
            await page.keyboard.press("Escape")
        assert printed(sys.executable, "-c", copied["Python"]) == answer
        events = printed("bash", "-c", copied["curl"]).split("\n\n")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
        assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks if each["choices"]) == answer


async def test_markup_is_text_wherever_it_comes_from(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny) as page:
        await page.get_by_label("Structured output", exact=True).select_option("choice")
        await page.get_by_label("What the structured output has to look like").fill(MARKUP)
        await page.get_by_label("System message").fill(MARKUP)
        await say(page, MARKUP)
        assert await texts(page) == [MARKUP, MARKUP]
        assert MARKUP[:50] in await page.locator(".conversations button").first.inner_text()
        for name in ("Copy as curl", "Copy as Python"):
            await page.get_by_role("button", name=name).click()
            assert "<script>" in await page.locator("dialog pre").inner_text()
            await page.keyboard.press("Escape")
        await page.get_by_role("button", name="Edit").click()
        assert await page.get_by_label("Edit the message").input_value() == MARKUP
        await page.reload()
        await page.locator(".conversations button").first.click()
        await expect(page.locator(".message")).to_have_count(2)
        assert await page.evaluate("window.hurt") is None


async def test_a_draining_server_is_told(serve: ServeFactory, open_page: OpenPage) -> None:
    with serve("server.drain_seconds=0.5", model=TINY, cutting=True) as server:
        async with open_page(server, allow=REFUSED) as page:
            await parameters(page, max_tokens=100000)
            await page.fill("#talk-input", "Talk on")
            await page.keyboard.press("Enter")
            await expect(page.locator(".message.model .body")).not_to_be_empty()
            server.terminate()
            await expect(page.locator(".message .error")).to_be_visible()
            await expect(page.locator("#banner")).to_be_visible()
        assert server.exit_code() == 0


async def test_it_works_from_other_machines_without_https(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny, host=ELSEWHERE) as page:
        assert not await page.evaluate("isSecureContext")
        await parameters(page, max_tokens=4)
        await say(page, "Hello")
        await page.get_by_role("button", name="Copy as curl").click()
        await page.get_by_role("dialog").get_by_role("button", name="Copy").click()
        assert f"curl -sN 'http://{ELSEWHERE}:{tiny.port}/v1/responses'" in await page.evaluate(
            "String(getSelection())"
        )


async def test_a_refused_key_is_asked_for_and_stays_in_the_tab(
    serve: ServeFactory, open_page: OpenPage, tmp_path: Path
) -> None:
    keys, names = tmp_path / "keys", ("a-key-that-is-revoked", "a-key-that-stays")
    keys.write_text("".join(f"{name}\n" for name in names))
    keys.chmod(0o600)
    with serve("auth.enabled=true", f"auth.api_keys_file={keys}", model=TINY) as server:
        async with open_page(server, allow=REFUSED) as page:
            asked: list[str] = []
            page.on("request", lambda each: asked.append(each.url))
            dialog = page.get_by_role("dialog")
            await expect(dialog).to_contain_text("No API key provided")
            await give_key(page, names[0])
            await parameters(page, max_tokens=4)
            await say(page, "Hello")
            keys.write_text(f"{names[1]}\n")
            eventually(lambda: server.http.get("/v1/models", headers={"x-api-key": names[0]}).status_code == 401)
            await page.fill("#talk-input", "Again")
            await page.keyboard.press("Enter")
            await expect(dialog).to_contain_text("Incorrect API key provided")
            await give_key(page, names[1])
            await page.get_by_role("button", name="Try again").click()
            await expect(page.locator(".stats")).to_have_count(2)
            await page.get_by_role("button", name="Copy as curl").first.click()
            assert "$OPENAI_API_KEY" in await page.locator("dialog pre").inner_text()
            stored = "JSON.stringify([localStorage, document.cookie, location.href, document.body.textContent])"
            seen = await page.evaluate(stored) + "".join(asked)
            assert not any(name in seen for name in names)


async def give_key(page: Page, key: str) -> None:
    dialog = page.get_by_role("dialog")
    await dialog.get_by_label("Key").fill(key)
    await page.keyboard.press("Enter")
    await expect(dialog).to_be_hidden()


async def test_a_model_without_a_tokenizer_says_so(odd: Server, open_page: OpenPage) -> None:
    async with open_page(odd, allow=REFUSED) as page:
        for mode in ("chat", "text"):
            await page.get_by_label("Mode", exact=True).select_option(mode)
            await page.fill("#talk-input", "Hello")
            await page.get_by_role("button", name="Send").click()
            await expect(page.locator(".middle > .error")).to_contain_text("tokenizer")
