"""Which responses are kept, and how they are replayed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import fakeredis
import httpx
import pytest
import redis.asyncio

from bdh_batch.backends.base import Ended
from bdh_batch.http.request.body import check
from bdh_batch.http.schema.requests import CompletionBody
from bdh_batch.http.serving import is_determined
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Origin, Prompt, TokenLogprob, Usage, Written
from bdh_batch.settings import Limits, ResponseCache as Chosen
from bdh_batch.store import byte_cache
from bdh_batch.store.byte_cache import ByteCache, MemoryCache, RedisCache, Unreachable, open_byte_cache
from bdh_batch.store.response_cache import SLICE, ResponseCache, key_of
from tests.conftest import ServeFactory, Server
from tests.processes.test_processes import TINY

REQUEST = GenerationRequest(Origin("r"), [Prompt([1, 2])], max_tokens=4, seeds=(7, 8), n=2)
STEPS = [
    [(0, Delta("a", [3], logprobs=[(0, TokenLogprob(3, -0.5, [(3, -0.5), (9, -1.5)]))], logprob=-0.5))],
    [(1, Delta("b\ud800", [4, 5])), (0, Delta(extras=[{"delta": {"reasoning_content": "x"}}]))],
    [(0, Delta(tokens=[6], finish_reason=FinishReason.STOP, stop="b")), (1, Delta("c", [], FinishReason.LENGTH))],
]


class Scripted:
    """A generation that brings what it is told to."""

    prompts: Sequence[Sequence[int]] = [[1, 2], [1, 2]]
    cached_tokens: Sequence[int] = [1, 0]

    def __init__(self, steps: Sequence[list[tuple[int, Delta]]]) -> None:
        self._steps = steps
        self.aborted = False

    def usage(self, completion_tokens: int) -> Usage:
        return Usage(2, completion_tokens, 1)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        for step in self._steps:
            yield step

    def abort(self) -> None:
        self.aborted = True

    def on_end(self, ended: Ended) -> None:
        """Nobody is told."""


async def read(cache: ResponseCache, steps: Sequence[list[tuple[int, Delta]]], most: int = 99) -> Counter[str]:
    """Has a client read so many steps of a generation that is recorded; returns what was counted."""
    counted: Counter[str] = Counter()
    recorded = cache.recorded("key", Scripted(steps), lambda outcome: counted.update([outcome]))
    number = 0
    async for _ in recorded:
        number += 1
        if number == most:
            break
    recorded.abort()
    return counted


async def replay(cache: ResponseCache) -> list[list[tuple[int, Delta]]] | None:
    found = await cache.find("key", REQUEST, lambda outcome: None)
    return None if found is None else [step async for step in found]


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ByteCache:
    if request.param == "memory":
        return MemoryCache(2**16, 60.0)
    monkeypatch.setattr(redis.asyncio, "Redis", fakeredis.FakeAsyncRedis)
    return RedisCache("redis://here", 60.0)


async def test_what_has_ended_well_is_replayed_as_it_was(storage: ByteCache) -> None:
    cache = ResponseCache(storage, 2**16)
    steps = [[(index, Delta(**_fields(delta))) for index, delta in step] for step in STEPS]
    steps[1][0] = (1, Delta("b", [4, 5]))
    assert await replay(cache) is None
    assert await read(cache, steps) == {"kept": 1}
    assert await replay(cache) == steps
    found = await cache.find("key", REQUEST, lambda outcome: None)
    assert found is not None
    assert [[*prompt] for prompt in found.prompts] == [[1, 2], [1, 2]]
    assert [*found.cached_tokens] == [1, 0]
    assert (found.usage(4), found.usage(2)) == (Usage(2, 4, 1), Usage(2, 2, 1))
    ended: list[int] = []
    found.on_end(lambda tokens, failure: ended.append(tokens))
    assert [step async for step in found]
    found.abort()
    found.abort()
    assert ended == [4]
    await cache.close()


@pytest.mark.parametrize(
    ("steps", "read_steps"),
    [
        ([*STEPS[:1], [(0, Delta(finish_reason=FinishReason.ERROR)), (1, Delta(finish_reason=FinishReason.STOP))]], 99),
        ([*STEPS[:1], [(0, Delta(finish_reason=FinishReason.ABORT)), (1, Delta(finish_reason=FinishReason.STOP))]], 99),
        (STEPS[2:], 1),  # the client has left
        ([[(0, Delta("a" * 3000, [1], FinishReason.STOP)), (1, Delta(finish_reason=FinishReason.STOP))]], 99),
    ],
)
async def test_nothing_else_is_kept(steps: list[list[tuple[int, Delta]]], read_steps: int) -> None:
    cache = ResponseCache(MemoryCache(2**16, 60.0), 2048)
    assert await read(cache, steps, read_steps) == {}
    assert await replay(cache) is None


async def test_memory_is_bounded_and_what_was_used_least_recently_goes() -> None:
    cache = MemoryCache(3 * (100 + byte_cache.KEY_BYTES), 60.0)
    for key in "abc":
        await cache.put(key, bytes(100))
    assert await cache.get("a")
    await cache.put("d", bytes(100))
    assert [key for key in "abcd" if await cache.get(key)] == ["a", "c", "d"]
    await cache.put("e", bytes(10_000))
    assert await cache.get("e") is None
    assert cache.held <= 3 * (100 + byte_cache.KEY_BYTES)


async def test_what_is_too_old_is_forgotten() -> None:
    now = 0.0
    cache = MemoryCache(2**16, 60.0, lambda: now)
    await cache.put("a", b"x")
    now = 59.0
    assert await cache.get("a") == b"x"
    now = 60.0
    assert await cache.get("a") is None


async def test_a_storage_that_fails_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(MemoryCache):
        async def get(self, key: str) -> bytes | None:
            raise Unreachable("gone")

        async def put(self, key: str, value: bytes) -> None:
            raise Unreachable("gone")

    cache, counted = ResponseCache(Broken(2**16, 60.0), 2048), Counter[str]()
    assert await cache.find("key", REQUEST, lambda outcome: counted.update([outcome])) is None
    assert await read(cache, STEPS[2:]) == {"failed": 1}
    assert counted == {"failed": 1}
    garbled = MemoryCache(2**16, 60.0)
    await garbled.put("key", b"no entry")
    assert await replay(ResponseCache(garbled, 2048)) is None


def test_a_redis_that_does_not_answer_ends_the_start() -> None:
    with pytest.raises(Exception, match=r"response_cache.storage: nothing answers at redis://\*\*\*@127.0.0.1:1"):
        open_byte_cache(Chosen(enabled=True, storage="redis://:secret@127.0.0.1:1"))


def test_a_key_is_of_all_that_decides() -> None:
    base: tuple[Any, ...] = ("ann", "r1", "CompletionBody", {"prompt": "a", "seed": 1}, {})
    others = [
        ("bob", *base[1:]),
        ("ann", "r2", *base[2:]),
        (*base[:2], "ChatBody", *base[3:]),
        (*base[:3], {"prompt": "a", "seed": 2}, {}),
        (*base[:4], {"x-user": "b"}),
    ]
    assert len({key_of(*each) for each in (base, *others)}) == 6
    assert key_of("ann", "r1", "CompletionBody", {"seed": 1, "prompt": "a"}, {}) == key_of(*base)
    assert key_of("ann", "r1", "CompletionBody", {"prompt": "\ud800", "seed": 10**30}, {})
    schemas = [{"properties": {key: {"type": "integer"} for key in names}} for names in ("ab", "ba")]
    assert (
        len({key_of("ann", "r1", "CompletionBody", {"guided_json": each}, {}) for each in schemas}) == 2
    )  # the order of the output, too


@pytest.mark.parametrize(
    ("given", "determined"),
    [({"seed": 1}, True), ({"temperature": 0}, True), ({}, False), ({"temperature": 0.5}, False)],
)
def test_a_request_to_an_upstream_is_determined_by_what_the_upstream_gets(
    given: dict[str, Any], determined: bool
) -> None:
    body = check({"prompt": "a", "seed": 1, "temperature": 0}, CompletionBody, Limits())
    assert is_determined(body, replace(REQUEST, written=Written(["a"], None, given, {}))) == determined


async def test_what_an_upstream_sends_beside_text_counts_too() -> None:
    cache = ResponseCache(MemoryCache(2**16, 60.0), 2048)
    extras = [[(0, Delta(extras=[{"delta": {"reasoning_content": "x" * 100}}]))] for _ in range(30)]
    assert await read(cache, [*extras, *STEPS[2:]]) == {}
    assert await replay(cache) is None


async def test_others_have_their_turn_while_a_long_response_is_replayed() -> None:
    cache = ResponseCache(MemoryCache(2**20, 60.0), 2**20)
    await read(cache, [*([(0, Delta("a", [1]))] for _ in range(1000)), *STEPS[2:]], 9999)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    assert len(await replay(cache) or ()) == 1001
    counting.cancel()
    assert turns >= 1000 // SLICE


def _fields(delta: Delta) -> dict[str, Any]:
    return {name: getattr(delta, name) for name in ("text", "tokens", "finish_reason", "logprobs", "logprob", "extras")}


@pytest.fixture(scope="module")
def keeping(serve: ServeFactory) -> Iterator[Server]:
    with serve("response_cache.enabled=true", "auth.enabled=true", "auth.api_keys=one,two", model=TINY) as server:
        server.http.headers["authorization"] = "Bearer one"
        yield server


class TestServer:
    """A server that keeps responses."""

    def post(self, server: Server, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        response = server.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response

    def test_replays_a_response_whole_and_as_a_stream(self, keeping: Server) -> None:
        body: dict[str, Any] = {"prompt": "a text", "max_tokens": 30, "temperature": 0, "logprobs": 2, "n": 2}
        first, again = (self.post(keeping, **body) for _ in range(2))
        assert [each.headers["x-cache"] for each in (first, again)] == ["miss", "hit"]
        assert first.json()["id"] != again.json()["id"]
        assert first.json()["choices"] == again.json()["choices"]
        usage = first.json()["usage"], again.json()["usage"]
        assert usage[0] == usage[1]
        chunks = keeping.events(**body, stream_options={"include_usage": True})
        texts = ["".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == n) for n in (0, 1)]
        assert texts == [choice["text"] for choice in again.json()["choices"]]
        assert chunks[-1]["usage"] == usage[0]

    def test_keeps_a_stream_that_was_read_to_its_end(self, keeping: Server) -> None:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "seed": 3}
        chunks = keeping.events("/v1/chat/completions", **body)
        found = self.post(keeping, "/v1/chat/completions", **body)
        assert found.headers["x-cache"] == "hit"
        said = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
        assert found.json()["choices"][0]["message"]["content"] == said

    def test_keeps_what_is_determined_for_its_caller_alone(self, keeping: Server) -> None:
        assert "x-cache" not in self.post(keeping, prompt="b", max_tokens=3).headers
        body: dict[str, Any] = {"prompt": "b", "max_tokens": 3, "seed": 5}
        assert self.post(keeping, **body).headers["x-cache"] == "miss"
        assert self.post(keeping, **body, model="tiny", user="u").headers["x-cache"] == "hit"
        assert self.post(keeping, **body | {"seed": 6}).headers["x-cache"] == "miss"
        other = httpx.post(
            f"{keeping.url}/v1/completions", json=body, headers={"authorization": "Bearer two"}, timeout=300
        )
        assert other.headers["x-cache"] == "miss"

    def test_does_not_keep_what_failed_or_was_left(self, keeping: Server) -> None:
        body: dict[str, Any] = {"prompt": "c", "max_tokens": 3000, "seed": 1, "ignore_eos": True}
        left = "bdh_request_success_total{finished_reason=abort}"
        before = keeping.metrics().get(left, 0)
        for _ in range(100):  # one is left too late where the test is late
            body["seed"] += 1
            with keeping.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                next(response.iter_lines())
            keeping.until_idle()
            if keeping.metrics().get(left, 0) > before:
                break
        else:
            raise AssertionError("none was left in the midst of it")
        assert self.post(keeping, **body).headers["x-cache"] == "miss"
        assert keeping.http.post("/v1/completions", json=body | {"priority": -5}).status_code == 403
        late = keeping.http.post("/v1/completions", json=body | {"seed": -1}, headers={"x-request-timeout": "0.05"})
        assert late.status_code in (408, 504)  # the former where others keep the cores, so that it never ran
        refused = keeping.http.post("/v1/completions", json=body | {"prompt": [70_000]})
        assert refused.status_code == 400
        assert not {"x-cache"} & {*late.headers, *refused.headers}
        counted = keeping.metrics()
        assert counted["bdh_response_cache_total{outcome=hit}"] >= 1
        assert counted["bdh_response_cache_total{outcome=kept}"] >= 1
        assert 0 < counted["bdh_response_cache_bytes"] < 2**20
