"""What pages asked for is asked for again; what ends or is refused meanwhile is no measurement."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("playwright", reason="needs playwright")

from benchmarks.client import Client
from benchmarks.server.recorded import Asked, Playing
from tests.conftest import eventually

if TYPE_CHECKING:
    from tests.conftest import Server

STREAM, PROBE, WRONG = "/watch/stream", "/readyz", "/watch/history?wrong=1"


def test_is_played_and_checked(tiny: Server) -> None:
    address = Client(tiny.url).address

    def asked(path: str, lasts: bool) -> Asked:
        return Asked(0.0, lasts, address.request("GET", path, {}, b""), f"GET {path}")

    async def play(requests: list[Asked], enough: int) -> None:
        playing = Playing(requests, address)
        await asyncio.to_thread(eventually, lambda: playing.complete + playing.begun >= enough)
        try:
            playing.check()
        finally:
            await playing.end()

    asyncio.run(play([asked(STREAM, lasts=True), asked(PROBE, lasts=False)], 3))
    with pytest.raises(RuntimeError, match=PROBE):
        asyncio.run(play([asked(STREAM, lasts=True), asked(PROBE, lasts=True)], 3))
    with pytest.raises(RuntimeError, match="400"):
        asyncio.run(play([asked(WRONG, lasts=False)], 2))
