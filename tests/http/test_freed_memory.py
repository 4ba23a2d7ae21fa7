"""Freed memory is given back once for all that was freed in a second, by a timer of the event loop."""

from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message

from bdh_batch.http.responses import json_pieces
from bdh_batch.system import freed_memory
from bdh_batch.system.freed_memory import WORTH_RETURNING, FreedMemory


@pytest.fixture
def returned(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    event = asyncio.Event()
    monkeypatch.setattr(freed_memory, "RETURN_SECONDS", 0.0)
    monkeypatch.setattr(FreedMemory, "_return", staticmethod(event.set))
    monkeypatch.setattr(json_pieces, "FREED_MEMORY", FreedMemory())
    return event


async def send(message: Message) -> None:
    del message


async def test_a_large_response_gives_its_memory_back(returned: asyncio.Event) -> None:
    piece = bytes(2**20)
    await json_pieces.send_pieces(send, [piece] * (WORTH_RETURNING // len(piece) + 1))
    await asyncio.wait_for(returned.wait(), 300)


async def test_a_small_one_does_not(returned: asyncio.Event) -> None:
    await json_pieces.send_pieces(send, [b"{}"] * 1000)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not returned.is_set()
