"""The parts of Talk that know no server, each in the browser that runs them: what `parts` has is called there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.async_api import Page

from tests.ui.browsing import OpenPage

if TYPE_CHECKING:
    from tests.conftest import Server


async def run(page: Page, name: str) -> Any:
    return await page.evaluate((Path(__file__).parent / "parts" / f"{name}.js").read_text())


async def test_parts_do_what_they_say(tiny: Server, open_page: OpenPage) -> None:
    async with open_page(tiny) as page:
        long = await run(page, "streamed_text")
        assert long["same"]
        assert long["blocks"] < 150
        assert long["kept"] <= 1 << 20
        assert long["ends"]
        assert "are not shown" in long["note"]
        assert await run(page, "sse") == [["a", "ä1", None], ["message", "2\n3", "7"]]
        assert await run(page, "fields") == [
            *(1.5, "f should be a number, not x.", -3, "f should be an integer, not 1.5."),
            *("f should lie between -2^53 and 2^53.", False, ["a", "\n", "b "], [1, 2, 3], "f should be JSON.", " a "),
            *(None, {"choice": ["a", "b"]}, {"json": {}}, None),
        ]
        kept = await run(page, "kept")
        assert kept["all"]
        assert not kept["huge"]
        assert kept["titles"][:2] == ["59", "58"]
        assert len(kept["titles"]) == kept["stored"] - 1 <= 50
        assert kept["shortened"] == [["a", None], ["one", "1"], ["b", None], ["two", "2"]]  # the first has expired
        assert kept["path"] == ["a", "one", "b", "three"]
        assert (kept["siblings"], kept["isStored"]) == (2, True)
        assert "### Model\n\nthree" in kept["markdown"]
        assert kept["title"] == "a" * 58 + "…"
