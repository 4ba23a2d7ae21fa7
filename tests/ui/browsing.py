"""What tests of the page share beside their fixtures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from playwright.async_api import Page

PATIENCE = 120_000.0  # milliseconds, on a machine that does much else
PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1200, "height": 800}

OpenPage = Callable[..., AbstractAsyncContextManager[Page]]
