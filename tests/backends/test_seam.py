"""Streams outlive their engine: what a client gets is what an undisturbed engine would have said."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bdh_batch.backends import engine_port
from bdh_batch.backends.remote import RemoteBackend
from bdh_batch.backends.replica import State
from bdh_batch.backends.wire import (
    PROTOCOL,
    Abort,
    FromEngine,
    Gain,
    Gains,
    Hello,
    Malformed,
    Refusal,
    Start,
    Unpacker,
    frame,
)
from bdh_batch.errors import InvalidRequest, QueueFull, Unavailable
from bdh_batch.messages import (
    Delta,
    FinishReason,
    GenerationRequest,
    LogitBias,
    Neurons,
    NeuronsAsked,
    Origin,
    Prompt,
    SamplingParams,
    SavedState,
    TokenLogprob,
)
from tests.backends.engines import POISON, FakeEngine, Whole, connect, empty, engines, read, until

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"seeds": (3, 4), "n": 2},
    "logprobs": {"sampling": SamplingParams(logprobs=3), "seeds": (1,)},
    "logprobs of the prompt": {"sampling": SamplingParams(logprobs=2), "prompt_logprobs": 2},
    "penalties": {"sampling": SamplingParams(presence_penalty=1.0, logit_bias=LogitBias.of({5: 1.0}))},
    "stop strings": {"stop": ("no such text", "\x00\x01\x02"), "sampling": SamplingParams(logprobs=0)},
    "neurons": {"neurons": NeuronsAsked(4), "seeds": (3, 4), "n": 2},
    "neurons of the prompt": {"neurons": NeuronsAsked(4, prompt=True), "sampling": SamplingParams(logprobs=1)},
    "min_tokens": {"min_tokens": 30, "stop_token_ids": tuple(range(0, 256, 3)), "include_stop": True},
}


def request(tokens: int = 60, prompts: int = 2, **changes: Any) -> GenerationRequest:
    fields = {"sampling": SamplingParams(), **changes}
    n = fields.pop("n", 1)
    seeds = tuple(fields.pop("seeds", (7,))) * prompts * n
    some = [Prompt(f"a prompt {number} of some length".encode()) for number in range(prompts)]
    return GenerationRequest(Origin("r-1", tenant="ann"), some, tokens, n=n, seeds=seeds[: n * prompts], **fields)


async def said(backend: RemoteBackend, wanted: GenerationRequest) -> list[tuple[object, ...]]:
    return [whole.facts() for whole in await read(await backend.generate(wanted), empty(wanted))]


@pytest.mark.parametrize("name", REQUESTS)
async def test_a_stream_whose_engine_is_killed_goes_on_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    one, other = FakeEngine(tmp_path / "one.sock"), FakeEngine(tmp_path / "other.sock")
    wanted = request(**REQUESTS[name])
    async with engines(one, other, max_failovers=1000) as backend:
        undisturbed = await said(backend, wanted)
        for kill_at in (0, 1, 2, 7, 8, 9, 23, 24, 41):
            wholes = empty(wanted)
            reading = asyncio.create_task(read(await backend.generate(wanted), wholes))
            computes = one if backend.replicas["one"].readers else other
            await until(lambda: len(wholes[0].tokens) >= kill_at or reading.done())  # noqa: B023
            await computes.kill()
            await computes.start()
            assert [whole.facts() for whole in await reading] == undisturbed
        assert not any(replica.readers for replica in backend.replicas.values())
        assert backend.load() == 0
        await until(lambda: not any(each.worker.load.running for each in (one, other)))


def test_a_delta_crosses_with_all_that_it_has() -> None:
    one = TokenLogprob(1, -0.5, [(1, -0.5), (2, -1.5)], rank=1)
    delta = Delta(
        text="a",
        tokens=[1],
        finish_reason=FinishReason.STOP,
        logprobs=[(0, one)],
        logprob=-0.5,
        prompt_logprobs=[one],
        pooled=[0.5],
        stop="b",
        neurons=[Neurons(1, 8, b"1234", b"12345678", b"87654321")],
        extras=[{"delta": {"tool_calls": []}}],
        saved=SavedState("a path", 7),
        save_error="c",
    )
    crossed = Unpacker(Gains)
    (gains,) = crossed.feed(frame(Gains([gain := Gain(7, 0, 3, delta)])))
    assert gains.gains == [gain]
    failed = Delta(finish_reason=FinishReason.ERROR, error=Unavailable("It is down.", retry_after=3))
    (gains,) = crossed.feed(frame(Gains([Gain(7, 0, 0, failed)])))
    (error,) = [each.delta.error for each in gains.gains]
    assert isinstance(error, Unavailable)
    assert (error.message, error.retry_after) == ("It is down.", 3)


def test_an_error_of_an_unknown_class_is_no_message() -> None:
    bytes_of = frame(Gains([Gain(7, 0, 0, Delta(error=Unavailable("no", retry_after=1)))]))
    with pytest.raises(Malformed, match="unknown class"):
        Unpacker(Gains).feed(bytes_of.replace(b"Unavailable", b"Unattainabl"))


async def test_an_engine_that_leaves_is_left(tmp_path: Path) -> None:
    one, other = FakeEngine(tmp_path / "one.sock"), FakeEngine(tmp_path / "other.sock")
    wanted = request(200, prompts=1)
    async with engines(one, other, max_failovers=1) as backend:
        undisturbed = await said(backend, wanted)
        wholes = empty(wanted)
        reading = asyncio.create_task(read(await backend.generate(wanted), wholes))
        leaving = one if backend.replicas["one"].readers else other
        await until(lambda: len(wholes[0].tokens) > 3)
        leaving.port.leave()
        await asyncio.wait_for(leaving.port.idle.wait(), 300)
        assert not reading.done()
        assert [whole.facts() for whole in await reading] == undisturbed
        assert backend.replicas[leaving.socket.stem].state is State.LEAVING
        await said(backend, wanted)  # nothing new goes there
        assert leaving.port.idle.is_set()


async def test_streams_wait_for_an_engine_where_there_is_none(tmp_path: Path) -> None:
    only = FakeEngine(tmp_path / "only.sock")
    wanted = request(40)
    async with engines(only) as backend:
        undisturbed = await said(backend, wanted)
        wholes = empty(wanted)
        reading = asyncio.create_task(read(await backend.generate(wanted), wholes))
        await until(lambda: len(wholes[0].tokens) > 3)
        await only.kill()
        await until(lambda: backend.ready() is not None)
        assert backend.health() is None
        with pytest.raises(Unavailable):
            await backend.generate(wanted)
        await only.start()
        assert [whole.facts() for whole in await reading] == undisturbed


@pytest.mark.parametrize("apart", [False, True], ids=["here", "on another machine"])
async def test_a_request_that_kills_engines_fails_alone(
    apart: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = [FakeEngine(tmp_path / f"{number}.sock", apart=apart) for number in range(3)]
    poison, harmless = (
        replace(request(40, prompts=1), origin=Origin("poison"), prompts=[Prompt([POISON] * 4)]),
        request(400, prompts=1),
    )
    async with engines(*some, max_failovers=2) as backend:
        undisturbed = await said(backend, harmless)
        for _ in range(3):
            wholes = [empty(harmless) for _ in some]
            reading = [asyncio.create_task(read(await backend.generate(harmless), whole)) for whole in wholes]
            deaths = sum(each.deaths for each in some)
            (whole,) = await read(await backend.generate(poison), empty(poison))
            assert (whole.finish_reason, whole.tokens) == (FinishReason.ERROR, [])
            assert sum(each.deaths for each in some) == deaths + 2
            for each in reading:
                assert [whole.facts() for whole in await each] == undisturbed
            await until(lambda: all(replica.state is State.READY for replica in backend.replicas.values()))
    assert [record.getMessage() for record in caplog.records if "has lost" in record.getMessage()] == [
        "request poison failed: it has lost 2 engines"
    ] * 3


async def test_refusals_come_back_as_they_are(tmp_path: Path) -> None:
    small = FakeEngine(tmp_path / "small.sock", slots=1, most_queued=1)
    async with engines(small) as backend:
        with pytest.raises(InvalidRequest) as refused:
            await backend.generate(request(5, prompts=1, stop_token_ids=(999,)))
        assert refused.value.param == "stop_token_ids[0]"
        running = [await backend.generate(request(500, prompts=1)) for _ in range(2)]
        with pytest.raises(QueueFull) as full:
            await backend.generate(request(5, prompts=1))
        assert full.value.retry_after >= 1
        for each in running:
            each.abort()
        await until(lambda: not small.worker.load.running and not small.worker.load.waiting)


async def test_who_is_no_front_end_of_ours_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    only = FakeEngine(tmp_path / "only.sock")
    async with engines(only) as backend:
        for bad in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\x05\x00\x00\x00hello", b"\x01\x00\x00\x00\xc0"):
            reader, writer = await asyncio.open_unix_connection(str(only.socket))
            writer.write(bad)
            assert b"Refusal" in await asyncio.wait_for(reader.read(), 300)
            writer.close()
            await writer.wait_closed()
        stranger = connect(only.address, backend, secret="a guess")
        other_version = connect(only.address, backend, version="0.0.0")
        await asyncio.sleep(0)
        assert await said(backend, request(5))
        assert stranger.state is other_version.state is State.CONNECTING
        stranger.close()
        other_version.close()
        await until(lambda: len(only.port.connections) == 1)


async def test_strangers_cannot_take_all_connections_nor_learn_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine_port, "MOST_GUESTS", 2)
    only = FakeEngine(tmp_path / "only.sock")
    async with engines(only) as backend:
        guests = [await asyncio.open_unix_connection(str(only.socket)) for _ in range(3)]
        assert await asyncio.wait_for(guests[0][0].read(), 300) == b""  # the first one makes room
        only.port.leave()
        guests[1][1].write(frame(Hello(PROTOCOL, "1\n2026-01-01 ERROR not from here" + "x" * 1000, "a guess")))
        (refusal,) = Unpacker(FromEngine).feed(await asyncio.wait_for(guests[1][0].read(), 300))
        assert isinstance(refusal, Refusal)  # and no heartbeat before it
        assert all("\n" not in each and len(each) < 300 for each in caplog.messages)
        await until(lambda: all(replica.state is State.LEAVING for replica in backend.replicas.values()))
        for _, each in guests:
            each.close()
            await each.wait_closed()
        await until(lambda: len(only.port.connections) == 1)


async def test_a_reader_that_is_slow_is_caught_up_with(tmp_path: Path) -> None:
    only = FakeEngine(tmp_path / "only.sock")
    wanted = request(300, prompts=1)
    async with engines(only) as backend:
        undisturbed = await said(backend, wanted)
        generation = await backend.generate(wanted)
        (connection,) = only.port.connections
        connection.pause_writing()
        await until(lambda: only.port.idle.is_set())  # all is computed, and nothing sent
        connection.resume_writing()
        whole = Whole()
        async for deltas in generation:
            for _, delta in deltas:
                whole.add(delta)
        generation.abort()
        assert [whole.facts()] == undisturbed
        assert whole.finish_reason is FinishReason.LENGTH


async def test_who_was_only_there_when_engines_were_killed_is_no_suspect_so_soon(tmp_path: Path) -> None:
    some = [FakeEngine(tmp_path / f"{number}.sock") for number in range(2)]
    poison = replace(request(40, prompts=1), origin=Origin("poison"), prompts=[Prompt([POISON] * 4)])
    async with engines(*some, max_failovers=2) as backend:
        await some[0].kill()  # with nothing in its step
        await some[0].start()
        await until(lambda: all(replica.state is State.READY for replica in backend.replicas.values()))
        wholes = empty(request(200, prompts=1))
        reading = asyncio.create_task(read(await backend.generate(request(200, prompts=1)), wholes))
        await until(lambda: len(wholes[0].tokens) > 3)
        computes = next(each for each in some if each.replica is not None and each.replica.readers)
        await computes.kill()  # with one in its step that has tokens
        await computes.start()
        await reading
        (whole,) = await read(await backend.generate(poison), empty(poison))
        assert whole.finish_reason is FinishReason.ERROR
        assert sum(each.deaths for each in some) == 4


async def test_a_prompt_that_kills_engines_is_found_beside_one_that_does_not(tmp_path: Path) -> None:
    some = [FakeEngine(tmp_path / f"{number}.sock") for number in range(2)]
    prompts = [Prompt(b"harmless"), Prompt([*b"a prompt that needs some more steps", POISON])]
    poison = replace(request(40), origin=Origin("poison"), prompts=prompts)
    async with engines(*some, max_failovers=2) as backend:
        wholes = await asyncio.wait_for(read(await backend.generate(poison), empty(poison)), 300)
        assert wholes[1].finish_reason is FinishReason.ERROR
        assert sum(each.deaths for each in some) == 2


async def test_a_stream_that_is_aborted_at_once_is_not_computed(tmp_path: Path) -> None:
    only = FakeEngine(tmp_path / "only.sock")
    async with engines(only) as backend:
        (connection,) = only.port.connections
        start = Start.of(7, request(10_000, prompts=1), [])
        connection.data_received(frame(start) + frame(Abort(7)))
        assert only.port.idle.is_set()
        await until(lambda: not connection._tasks)
        await until(lambda: not only.worker.load.running and not only.worker.load.waiting)
        assert await said(backend, request(5))


async def test_the_reader_of_a_stream_that_is_aborted_is_told(tmp_path: Path) -> None:
    only = FakeEngine(tmp_path / "only.sock")
    async with engines(only) as backend:
        generation = await backend.generate(request(10_000, prompts=1, n=3))
        async for deltas in generation:
            if any(delta.finish_reason is not None for _, delta in deltas):
                break
            generation.abort()  # once and again: as the client leaves, and on the way out
        ended = {index: delta.finish_reason for index, delta in deltas if delta.finish_reason is not None}
        assert ended == dict.fromkeys(range(3), FinishReason.ABORT)
        assert [deltas async for deltas in generation] == []


async def test_a_drain_waits_for_what_is_being_started(tmp_path: Path) -> None:
    only = FakeEngine(tmp_path / "only.sock")
    wanted = request(20, prompts=1)
    async with engines(only) as backend:
        starting = asyncio.create_task(backend.generate(wanted))
        await asyncio.sleep(0)  # it has been sent, and not confirmed
        draining = asyncio.create_task(backend.drain(60))
        generation = await starting
        await said(backend, request(2, prompts=1))
        assert not draining.done()
        (whole,) = await read(generation, empty(wanted))
        assert whole.finish_reason is FinishReason.LENGTH
        await draining
