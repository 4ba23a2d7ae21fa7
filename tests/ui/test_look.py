"""Look: each token of a text, with what it fires and how likely it was, is on the page as the API reports it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import Locator, Page, expect

from bdh_batch.http.neurons.study_file import FILE
from tests.ui.browsing import PHONE, OpenPage, serious

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"
PROMPT = "<img src=x onerror=alert(1)> é“\n"
TOP = 4
REFUSED = ("Failed to load resource",)
STUDY = '<b title="x">&amp; a study'
NEURON = {"layer": 1, "head": 0, "neuron": 9}
UNITS = Path(__file__).with_name("look_units.js").read_text("utf-8")


async def test_what_is_kept_of_a_text_is_bounded_and_neurons_have_their_dots(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny) as page:
        found = await page.evaluate(UNITS)
    assert found["labels"] == ["·", "·", "“", "·", "\ufffdx", "7"]
    assert found["others"] == ["a", "7"]
    assert found["ends"] == [1, 2, "token 6"]
    kept = found["most"] // (6 * 64)
    assert (found["begin"], found["end"], found["oldest"]) == (20000 - kept, 20000, 20000 - kept)
    assert (found["last"], found["fires"], found["silent"]) == (str(19999 % 300), kept, 0)
    assert found["bytes"] < 18 * 2**20
    assert (found["dots"], found["wrong"]) == (3 * 5 * 1000, 0)
    assert found["pixels"] < 2**21


async def looked(page: Page, prompt: str, tokens: int) -> None:
    await page.get_by_label("Text that the model reads").fill(prompt)
    await page.get_by_label("Tokens to generate").fill(str(tokens))
    await page.get_by_label("Temperature").fill("0")
    if await page.get_by_label("Strongest neurons of a layer").is_visible():
        await page.get_by_label("Strongest neurons of a layer").fill(str(TOP))
    await page.keyboard.press("Enter")


def reported(server: Server, prompt: str, tokens: int) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "echo": True, "logprobs": 5}
    (choice,) = server.complete(**body, neurons={"top": TOP})["choices"]
    return dict(choice)


def level(logprob: float | None) -> str:
    least = (0.5, 0.1, 0.01, 0)
    return "" if logprob is None else f" p{next(at for at, each in enumerate(least) if math.exp(logprob) >= each)}"


async def test_a_text_is_shown_as_it_is_generated_and_looked_through_by_keyboard(
    tiny: Server, open_page: OpenPage
) -> None:
    expected = reported(tiny, PROMPT, 30)
    names, neurons = expected["logprobs"]["tokens"], expected["neurons"]
    async with open_page(tiny, "#look") as page:  # there is no study of this model
        await looked(page, PROMPT, 30)
        letters = page.locator("#view-look .letters .letter")
        await expect(letters).to_have_count(len(names))
        kinds = await letters.evaluate_all("all => all.map(each => each.className)")
        assert kinds == [f"letter{level(each)}" for each in expected["logprobs"]["token_logprobs"]]
        shown = await letters.evaluate_all("all => all.map(each => each.textContent).join('')")
        assert shown.startswith("<img src=x onerror=alert(1)> ·é··“⏎\n")
        await page.locator("#view-look .letters").focus()
        for key in ("End", "Home", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
            await page.keyboard.press(key)
        await expect(letters.nth(2)).to_be_focused()
        assert await letters.evaluate_all("all => all.filter(each => each.tabIndex === 0).length") == 1
        tip = page.get_by_role("tooltip")
        await expect(tip).to_contain_text("“m”, probability")
        assert await tip.locator("li").count() == 5
        await page.keyboard.press("Escape")
        await expect(tip).to_be_hidden()
        await letters.nth(4).hover()
        await expect(tip).to_contain_text("“␣”")
        await check_token(page, neurons[2])
        strongest = neurons[2]["layers"][1]["strongest"][0]
        name = f"layer 1, head {strongest['head']}, neuron {strongest['neuron']}"
        await page.get_by_role("button", name=f"{name}, activation").focus()
        await page.keyboard.press("Enter")
        await check_neuron(
            page, letters, neurons, {"layer": 1, "head": strongest["head"], "neuron": strongest["neuron"]}
        )
        await expect(page.get_by_label("The chosen neuron")).to_contain_text("has no usable neurons/neurons.json")


async def test_one_text_is_looked_at_at_a_time(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny, "#look") as page:
        asked: list[str] = []
        page.on("request", lambda each: asked.append(each.url) if each.method == "POST" else None)
        await page.get_by_label("Tokens to generate").fill("20000")
        await page.get_by_label("Strongest neurons of a layer").fill("1")
        await page.get_by_role("button", name="Look").click()
        stop = page.get_by_role("button", name="Stop")
        await expect(stop).to_be_visible()
        await page.get_by_label("Text that the model reads").press("Control+Enter")
        await stop.click()
        await expect(stop).to_be_hidden()
        assert len(asked) == 1


async def check_token(page: Page, expected: dict[str, Any]) -> None:
    """The table, and the map, have the token's neurons."""
    rows = page.get_by_role("region", name="Strongest neurons of each layer").locator("tbody tr")
    buttons = await rows.evaluate_all(
        "all => all.map(row => [...row.querySelectorAll('button')].map(b => b.textContent))"
    )
    wanted = [
        [f"{n['head']}:{n['neuron']} {n['value']:.2f}" for n in layer["strongest"]] for layer in expected["layers"]
    ]
    assert buttons == wanted
    lit = await page.locator("#view-look .dots canvas").evaluate(
        """canvas => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const counts = new Map();
          for (const dot of new Uint32Array(data.buffer)) if (dot) counts.set(dot, 1 + (counts.get(dot) ?? 0));
          return [...counts.values()];
        }"""
    )
    assert sum(lit) == 2 * 2 * 128
    assert sum(lit) - max(lit) == sum(map(len, wanted))
    await page.get_by_text("The map as a table").click()
    cells = page.get_by_role("region", name="strongest neurons by layer and head").locator("tbody td")
    for layer, found in enumerate(expected["layers"]):
        for head in range(2):
            own = [n["value"] for n in found["strongest"] if n["head"] == head]
            await expect(cells.nth(2 * layer + head)).to_have_text(
                f"{len(own)}, up to {max(own):.2f}" if own else "none"
            )


async def check_neuron(page: Page, letters: Locator, neurons: list[dict[str, Any]], wanted: dict[str, int]) -> None:
    """The tokens that fire it are marked, and listed."""
    fires = [
        any((n["head"], n["neuron"]) == (wanted["head"], wanted["neuron"]) for n in each["layers"][1]["strongest"])
        for each in neurons
    ]
    await expect(page.get_by_label("The chosen neuron")).to_contain_text(f"for {sum(fires)} of {len(neurons)} tokens")
    assert await letters.evaluate_all("all => all.map(each => each.classList.contains('fires'))") == fires
    await expect(page.locator("#view-look .ring")).to_be_visible()
    await page.locator("#view-look .occurrences button").last.click()
    await expect(page.locator("#view-look .letter.fires:focus")).to_be_visible()


@pytest.fixture(scope="module")
def studied(serve: ServeFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a file of a stranger's, who writes markup, and before it a gateway."""
    folder = tmp_path_factory.mktemp("studied") / "tiny"
    shutil.copytree(TINY, folder)
    facts = {"text": STUDY, "tokens": 5, "length": 5, "layers": 2, "heads": 2, "neurons_per_head": 128}
    context = {"position": 1, "byte": 1, "value": 1.5, "before": STUDY, "token": "</td>", "after": "<i>"}
    line = json.dumps({**NEURON, "active": 0.4, "contexts": [context]})
    (folder / FILE).parent.mkdir()
    (folder / FILE).write_text(json.dumps(facts)[:-1] + f',"neurons":[\n{line}\n]}}\n')
    with serve(model=folder) as server:
        yield server


async def test_a_neuron_is_shown_where_it_fires_in_the_text_it_was_studied_with(
    studied: Server, open_page: OpenPage
) -> None:
    async with open_page(studied, "#look", viewport=PHONE, color_scheme="dark", bypass_csp=True) as page:
        await looked(page, "a text", 0)
        await expect(page.locator("#view-look .letters .letter")).to_have_count(6)
        await page.locator("#view-look .letters .letter").nth(1).click()
        panel = page.get_by_label("The chosen neuron")
        for name, value in NEURON.items():
            await panel.get_by_label(name, exact=True).fill(str(value))
        await panel.get_by_role("button", name="Show").click()
        await expect(panel).to_contain_text(f"It fires for 40\u00a0% of the tokens of {STUDY} (5).")
        await expect(panel.locator("td code")).to_have_text(f"{STUDY}</td><i>")
        await panel.get_by_label("neuron", exact=True).fill("8")
        await page.keyboard.press("Enter")
        await expect(panel).to_contain_text("It fires for no token")
        assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert await serious(page, "dark") == []
        assert await serious(page, "light") == []


async def test_of_many_tokens_fewer_neurons_are_shown(tiny: Server, open_page: OpenPage) -> None:
    most = tiny.http.get("/v1/neurons").json()["max_neurons"]
    async with open_page(tiny, "#look") as page:
        look, generated = page.get_by_role("button", name="Look"), page.get_by_label("Tokens to generate")
        await page.get_by_label("Text that the model reads").fill("a")
        await generated.fill("100000")
        async with page.expect_request("**/v1/completions") as asked:
            await look.click()
        shown = most // (100_002 * 2)
        assert json.loads((await asked.value).post_data or "")["neurons"] == {"top": shown}
        await expect(page.get_by_text(f"the {shown} strongest neurons of a layer are shown, not 8")).to_be_visible()
        await page.get_by_role("button", name="Stop").click()
        await expect(look).to_be_enabled()


async def test_of_too_many_tokens_none_are_shown(serve: ServeFactory, open_page: OpenPage) -> None:
    text = "ab\n" * 4_000
    with serve("limits.max_neurons=20000", model=TINY) as server:  # of 12,000 tokens, not one in each of two layers
        async with open_page(server, "#look") as page:
            await text_alone_is_shown(page, text)


async def text_alone_is_shown(page: Page, text: str) -> None:
    look = page.get_by_role("button", name="Look")
    prompt = page.get_by_label("Text that the model reads")
    await prompt.evaluate("(area, text) => { area.value = text; }", text)  # typing takes a browser minutes
    await page.get_by_label("Tokens to generate").fill("0")
    async with page.expect_request("**/v1/completions") as asked:
        await look.click()
    assert "neurons" not in json.loads((await asked.value).post_data or "")
    await expect(page.get_by_text("too many tokens to show their neurons")).to_be_visible()
    await expect(page.get_by_text(f"{len(text):,} tokens", exact=True)).to_be_visible()
    await expect(page.get_by_role("region", name="Neurons")).to_be_hidden()
    await expect(look).to_be_enabled()
    letters = page.locator("#view-look .letters .letter")
    await expect(letters).to_have_count(len(text) % 1024)
    await letters.last.click()
    await expect(page.get_by_label("The chosen token")).to_contain_text(f"Number {len(text):,}, probability")
    await expect(letters.last).to_have_class(re.compile(r"p\d"))

    await prompt.evaluate("area => { area.value = area.value.repeat(25); }")
    await look.click()
    await expect(page.get_by_role("alert").filter(has_text="at most 262,144 can be looked at")).to_be_visible()


async def test_what_cannot_be_shown_is_said(
    odd: Server, tiny: Server, serve: ServeFactory, open_page: OpenPage
) -> None:
    async with open_page(odd, "#look") as page:
        await expect(page.get_by_text("This model has no tokenizer")).to_be_visible()
        ids = page.get_by_label("Token ids that the model reads")
        await ids.fill("3, x")
        await page.get_by_role("button", name="Look").click()
        await expect(page.get_by_role("alert").filter(has_text="Token ids are whole numbers")).to_be_visible()
        await ids.fill("3 5")
        await page.get_by_label("Tokens to generate").fill("2")
        await page.get_by_role("button", name="Look").click()
        await expect(page.locator("#view-look .letters .letter")).to_have_count(4)
    upstream = {"id": "far", "kind": "openai", "url": f"{tiny.url}/v1", "model": "tiny"}
    with serve(f"upstreams={json.dumps([upstream])}", verb="gateway") as gateway:
        async with open_page(gateway, "#look", allow=REFUSED) as page:
            await expect(page.get_by_text("not computed by this server")).to_be_visible()
            await looked(page, "a", 3)
            await expect(page.locator("#view-look .letters .letter").nth(1)).to_be_visible()
            await expect(page.get_by_text("The map as a table")).to_be_hidden()
