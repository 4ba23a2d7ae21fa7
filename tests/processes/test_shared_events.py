"""The events of a response in the background can be read from any process of a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path

import pytest

from bdh_batch.errors import Unavailable
from bdh_batch.http.responses.frames import COMMENT, DONE
from bdh_batch.http.responses_api.background import EventLog
from bdh_batch.http.responses_api.shared_events import OtherLog, SharedEvents
from bdh_batch.processes import others
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.others import EVENTS, Others, answers_of_front_end
from bdh_batch.processes.questions import answer, follow
from bdh_batch.store.recent import Recent
from tests.conftest import HANG_SECONDS

BIG = 200_000  # bytes of an event, more than what is read at once


def event(number: int, size: int = 0) -> bytes:
    return b'event: a\ndata: {"sequence_number":%d,"text":"%b"}\n\n' % (number, b"x" * size)


async def joined(parts: AsyncIterator[bytes]) -> bytes:
    async with asyncio.timeout(HANG_SECONDS):
        return b"".join([part async for part in parts])


async def test_another_process_has_them_as_they_come(tmp_path: Path) -> None:
    folder, theirs, mine, log = RuntimeFolder(tmp_path), SharedEvents(), SharedEvents(), EventLog(2**20)
    theirs.offer(lambda owner, id: log if (owner, id) == ("me", "resp_1") else None)
    mine.join(Others(folder, "mine"))
    log.add(event(0) + event(1, BIG) + event(2), 3)
    answers = answers_of_front_end(Recent(0), theirs)
    async with await answer(folder.questions("theirs"), answers, patient=[EVENTS]):
        assert await mine.find("you", "resp_1") is None
        found = await mine.find("me", "resp_1")
        assert found is not None
        assert found.earliest == 0
        reading = asyncio.create_task(joined(found.read(0)))
        await asyncio.sleep(0)
        log.add(event(3), 4)
        log.end()
        assert await reading == event(1, BIG) + event(2) + event(3) + DONE
        log.add(event(4, 2**20), 5)  # for which the earlier ones make room
        found = await mine.find("me", "resp_1")
        assert found is not None
        assert found.earliest == 4


async def test_a_process_that_ends_before_the_response_is_an_error_at_their_end(tmp_path: Path) -> None:
    async def cut_short(*asked: object) -> AsyncGenerator[bytes, None]:
        yield event(5) + COMMENT + event(6) + event(7, BIG)[: BIG // 2]
        raise OSError("it has ended")

    async def earliest(*asked: object) -> AsyncGenerator[bytes, None]:
        yield b"0"

    folder, mine = RuntimeFolder(tmp_path), SharedEvents()
    mine.join(Others(folder, "mine"))
    answers = {EVENTS: cut_short, "earliest event": earliest}
    async with await answer(folder.questions("theirs"), answers):
        found = await mine.find("me", "resp_1")
        assert found is not None
        received = await joined(found.read(4, HANG_SECONDS))
        begun = event(5) + COMMENT + event(6)
        assert received.startswith(begun + b"event: error\ndata: ")
        assert received.endswith(DONE)
        error = json.loads(received.removeprefix(begun).removesuffix(DONE).split(b"data: ")[1])
        assert (error["sequence_number"], error["code"]) == (7, "service_unavailable")
    missing = await joined(found.read(4))  # it has ended before it was asked
    assert missing.startswith(b"event: error\n")


async def test_a_process_that_does_not_answer_is_no_process_that_has_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error that passes, unless another one has them, who is not kept waiting."""
    monkeypatch.setattr(others, "SECONDS", 0.05)
    ended = asyncio.Event()

    async def silent(*asked: object) -> AsyncGenerator[bytes, None]:
        try:
            await asyncio.Event().wait()
            yield b""
        finally:
            ended.set()

    async def earliest(*asked: object) -> AsyncGenerator[bytes, None]:
        yield b"3"

    folder, mine = RuntimeFolder(tmp_path), SharedEvents()
    mine.join(Others(folder, "mine"))
    questions = {EVENTS: silent, "earliest event": silent}
    async with await answer(folder.questions("silent"), questions):
        with pytest.raises(Unavailable, match="did not answer") as late:
            await mine.find("me", "resp_1")
        assert late.value.retry_after == 1
        await asyncio.wait_for(ended.wait(), HANG_SECONDS)
        monkeypatch.setattr(others, "SILENT_SECONDS", 0.05)
        log = OtherLog(0, "silent", "me", "resp_1", Others(folder, "mine"))
        error = await joined(log.read(-1, keepalive=0.01))
        assert error.startswith(b"event: error\n")
        assert error.endswith(DONE)
        monkeypatch.setattr(others, "SECONDS", HANG_SECONDS)
        async with await answer(folder.questions("theirs"), {"earliest event": earliest}):
            async with asyncio.timeout(HANG_SECONDS / 2):
                found = await mine.find("me", "resp_1")
        assert found is not None
        assert found.earliest == 3


async def test_who_leaves_is_sent_nothing_more(tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            yield b"a part"
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with await answer(tmp_path / "theirs", {"it": endless}):
        reading = follow(tmp_path / "theirs", HANG_SECONDS, "it")
        assert await anext(reading) == b"a part"
        assert not ended.is_set()
        await reading.aclose()  # type: ignore[attr-defined]  # it is a generator
        await asyncio.wait_for(ended.wait(), HANG_SECONDS)
