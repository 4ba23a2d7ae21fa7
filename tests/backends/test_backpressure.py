"""An engine that stands still is sent no more than a bound, others do its work, and nothing of it is lost."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from bdh_batch.backends import replica
from bdh_batch.backends.remote import RemoteBackend
from bdh_batch.backends.stream import RemoteStream
from bdh_batch.backends.wire import Start, frame
from bdh_batch.errors import Unavailable
from bdh_batch.messages import GenerationRequest, Origin, Prompt, SamplingParams
from tests.backends.engines import FakeEngine, Whole, empty, engines, read, until

MOST_UNSENT = 2**16
SHORT = GenerationRequest(Origin("short"), [Prompt(b"a prompt")], 60, sampling=SamplingParams(), seeds=(7,))
LONG = replace(SHORT, origin=Origin("long"), prompts=[Prompt(b"x" * 2**14)])


async def started_and_left(backend: RemoteBackend, request: GenerationRequest) -> None:
    """A client asks, and leaves once that was sent."""
    starting = asyncio.create_task(backend.generate(request))
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting])


async def said(backend: RemoteBackend, request: GenerationRequest) -> list[Whole]:
    return await read(await backend.generate(request), empty(request))


async def test_what_waits_for_an_engine_that_does_not_read_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "MOST_UNSENT", MOST_UNSENT)
    still, other = FakeEngine(tmp_path / "still.sock"), FakeEngine(tmp_path / "other.sock")
    async with engines(still, other) as backend:
        both = backend.replicas
        backend.replicas = {"still": both["still"]}
        try:
            (undisturbed,) = await said(backend, SHORT)
            running = asyncio.create_task(said(backend, replace(SHORT, max_tokens=200)))
            await until(lambda: still.worker.load.running)
            (engine_side,) = still.port.connections
            engine_side._transport.pause_reading()
            waiting = asyncio.create_task(said(backend, SHORT))
            await asyncio.sleep(0)
            while backend.ready() is None:
                await started_and_left(backend, LONG)
            with pytest.raises(Unavailable, match="no engine reads") as refused:
                await backend.generate(SHORT)
            assert refused.value.retry_after == 1
            (whole,) = await running  # it was there before, and has its tokens
            assert len(whole.tokens) == 200
            connection = both["still"]._connection
            assert connection is not None
            unsent = connection._transport.get_write_buffer_size()
            assert MOST_UNSENT < unsent < MOST_UNSENT + len(frame(Start.of(1, LONG, []))) + 1000
        finally:
            backend.replicas = both
        assert len(both["still"].readers) == 1
        assert backend.ready() is None
        assert [each.facts() for each in await said(backend, SHORT)] == [undisturbed.facts()]  # by the other engine
        assert not waiting.done()
        engine_side._transport.resume_reading()
        assert [each.facts() for each in await waiting] == [undisturbed.facts()]
        await until(lambda: both["still"].accepts)


async def test_it_is_bounded_also_where_many_streams_move_there_at_once(tmp_path: Path) -> None:
    """Those that do not fit wait, and are sent as it reads: such that had begun elsewhere, and new ones."""
    still, other = FakeEngine(tmp_path / "still.sock"), FakeEngine(tmp_path / "other.sock")
    async with engines(still, other) as backend:
        both = backend.replicas
        connection = both["still"]._connection
        assert connection is not None
        connection._transport.set_write_buffer_limits(high=MOST_UNSENT)
        connection._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        (engine_side,) = still.port.connections
        engine_side._transport.pause_reading()
        backend.replicas = {"other": both["other"]}
        moved = both["other"].readers
        running = [asyncio.create_task(said(backend, LONG)) for _ in range(8)]
        await until(lambda: sum(isinstance(each, RemoteStream) and each.confirmed for each in moved.values()) == 8)
        running += [asyncio.create_task(said(backend, LONG)) for _ in range(8)]
        await asyncio.sleep(0)
        assert len(moved) > 8  # some of which the engine has not started
        count = len(moved)
        backend.replicas = both
        both["other"].leave()
        unsent = connection._transport.get_write_buffer_size()
        assert MOST_UNSENT < unsent < MOST_UNSENT + len(frame(Start.of(1, LONG, []))) + 5000  # with the tokens so far
        assert len(both["still"].readers) + len(backend._failover.waiting) == count
        engine_side._transport.resume_reading()
        texts = [[each.facts() for each in whole] for whole in await asyncio.gather(*running)]
        assert texts == [texts[0]] * 16
