"""What tests of the page share beside their fixtures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Literal

from axe_core_python.async_playwright import Axe
from playwright.async_api import Page, ViewportSize

PATIENCE = 120_000.0  # milliseconds, on a machine that does much else
ELSEWHERE = "box.local"  # a name of this machine's for which browsers want HTTPS before they give pages everything
PHONE: ViewportSize = {"width": 360, "height": 740}
DESKTOP: ViewportSize = {"width": 1200, "height": 800}

NO_MORE = {"resultTypes": ["violations"]}  # not each element's way through each rule: of a long page, megabytes

Scheme = Literal["light", "dark"]
OpenPage = Callable[..., AbstractAsyncContextManager[Page]]


async def serious(page: Page, scheme: Scheme) -> list[str]:
    """What axe-core finds wrong with a page for those who do not see it, or see little; opened with `bypass_csp`."""
    await page.emulate_media(color_scheme=scheme)
    found = await Axe().run(page, options=NO_MORE)
    bad = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    return [f"{each['id']}: {node['html']} {node['failureSummary']}" for each in bad for node in each["nodes"]]
