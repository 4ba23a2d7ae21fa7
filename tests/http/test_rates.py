"""Requests and tokens per minute, in memory and in Redis: a real one where it is installed, and fakeredis, which speaks
the protocol over TCP and can be made to do what a real one does not."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from fakeredis import TcpFakeServer

from bdh_batch.backends.base import Backend, Ended, Generation
from bdh_batch.errors import ConfigError, InvalidRequest, QueueFull
from bdh_batch.http.auth import ledger, rates as rates_module
from bdh_batch.http.auth.caller import Caller, by_key
from bdh_batch.http.auth.keys import Key
from bdh_batch.http.auth.ledger import RETAINED
from bdh_batch.http.auth.quota import Quota
from bdh_batch.http.auth.rates import Rates
from bdh_batch.http.errors import Forbidden, RateLimited
from bdh_batch.http.request.client import Client
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Origin, Prompt, SamplingParams
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import RateLimiting
from tests.conftest import HANG_SECONDS, eventually, free_port

ANN = Caller("ann")
BOB = Caller("bob")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may be so busy that Redis takes longer than it may elsewhere: it is away only where a test says so."""
    monkeypatch.setattr(ledger, "REDIS_SECONDS", HANG_SECONDS)


@contextmanager
def redis() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    server = TcpFakeServer(address, server_type="redis")
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"redis://:secret-word@{address[0]}:{address[1]}/0"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis() as url:
        yield url.replace(":secret-word@", "")


@pytest.fixture(scope="module")
def real_redis_url() -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("Redis is not installed: apt-get install redis-server")
    port = free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--daemonize", "no")
    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as server:
        try:
            eventually(lambda: answers(port))
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@pytest.fixture(params=["memory", "redis_url", "real_redis_url"])
def storage(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    yield "memory" if request.param == "memory" else str(request.getfixturevalue(request.param))
    assert not caplog.records, "it is Redis that has counted"


numbers = iter(range(1000))


@pytest.fixture
def ann() -> Caller:
    """Someone whom no other test knows: Redis remembers."""
    return Caller(f"ann {next(numbers)}")


def rates_of(storage: str = "memory", **settings: Any) -> Rates:
    return Rates(RateLimiting(enabled=True, storage=storage, **settings), Metrics("model"))


async def settled(rates: Rates) -> None:
    while rates._settling:
        await next(iter(rates._settling))


async def test_requests_are_counted_for_each_caller(storage: str, ann: Caller) -> None:
    rates, standing = rates_of(storage, requests_per_minute=3), dict[str, str]()
    for remaining in (2, 1, 0):
        await rates.count_request(ann, standing)
        assert standing["x-ratelimit-remaining-requests"] == str(remaining)
        assert standing["x-ratelimit-limit-requests"] == "3"
        assert 1 <= int(standing["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
    with pytest.raises(RateLimited) as refused:
        await rates.count_request(ann, standing)
    assert 1 <= refused.value.retry_after <= 60
    await rates.count_request(Caller(ann.label + "'s neighbour"), {})


async def test_tokens_are_reserved_and_what_is_not_used_comes_back(storage: str, ann: Caller) -> None:
    rates, standing = rates_of(storage, tokens_per_minute=100), dict[str, str]()
    first = await rates.reserve(ann, 60, standing)
    assert first is not None
    assert standing["x-ratelimit-remaining-tokens"] == "40"
    with pytest.raises(RateLimited, match="up to 41, 40 are left"):
        await rates.reserve(ann, 41, standing)
    assert standing["x-ratelimit-remaining-tokens"] == "40"
    rates.settle(first, 10)
    await settled(rates)
    second = await rates.reserve(ann, 90, standing)
    assert second is not None
    assert standing["x-ratelimit-remaining-tokens"] == "0"
    rates.settle(second, 90)
    await settled(rates)
    with pytest.raises(RateLimited):
        await rates.reserve(ann, 1, standing)


async def test_more_tokens_than_a_minute_has_are_a_bad_request() -> None:
    with pytest.raises(InvalidRequest) as refused:
        await rates_of(tokens_per_minute=100).reserve(ANN, 101, {}, "input")
    assert refused.value.param == "input"


async def test_what_does_not_count_any_more_is_not_given_back(storage: str, ann: Caller) -> None:
    rates, standing = rates_of(storage, tokens_per_minute=100), dict[str, str]()
    reservation = await rates.reserve(ann, 60, standing)
    assert reservation is not None
    late = replace(reservation.grant, slot=reservation.grant.slot - RETAINED)
    rates.settle(replace(reservation, grant=late), 0)
    await settled(rates)
    await rates.reserve(ann, 10, standing)
    assert standing["x-ratelimit-remaining-tokens"] == "30"


async def test_a_keys_own_limits_hold_over_the_settings_and_without_them() -> None:
    own = by_key(Key(sha256="a" * 64, requests_per_minute=1, tokens_per_minute=10))
    for rates in (rates_of(requests_per_minute=5), Rates(RateLimiting(), Metrics("model"))):
        await rates.count_request(own, {})
        with pytest.raises(RateLimited):
            await rates.count_request(own, {})
        with pytest.raises(InvalidRequest):
            await rates.reserve(own, 11, {})
    standing: dict[str, str] = {}
    assert await rates.reserve(ANN, 10**9, standing) is None
    await rates.count_request(ANN, standing)
    assert standing == {}


async def test_two_servers_share_what_redis_counts(redis_url: str, ann: Caller) -> None:
    one, other = (rates_of(redis_url, requests_per_minute=2) for _ in range(2))
    await one.count_request(ann, {})
    await other.count_request(ann, {})
    with pytest.raises(RateLimited):
        await one.count_request(ann, {})


async def test_while_redis_is_away_limits_hold_here(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ann: Caller
) -> None:
    monkeypatch.setattr(rates_module, "RETRY_SECONDS", 3600.0)
    with redis() as url:
        metrics = Metrics("model")
        storage = url.replace(":secret-word@", "")
        rates = Rates(RateLimiting(enabled=True, storage=storage, requests_per_minute=2), metrics)
        await rates.count_request(ann, {})
    rates._ledgers._shared.client.connection_pool.disconnect()  # type: ignore[union-attr]
    for _ in range(2):
        await rates.count_request(ann, {})
    with pytest.raises(RateLimited):
        await rates.count_request(ann, {})
    (record,) = [record for record in caplog.records if "rate_limiting.storage" in record.getMessage()]
    assert record.levelname == "WARNING"
    assert b"bdh_rate_limit_storage_failures_total" in metrics.exposition()
    assert b'bdh_rate_limit_storage_failures_total{model_name="model"} 1.0' in metrics.exposition()


def test_redis_that_does_not_answer_at_the_start_is_refused_without_its_password() -> None:
    with redis() as url:
        pass
    with pytest.raises(ConfigError, match=r"rate_limiting\.storage") as refused:
        rates_of(url)
    assert "secret-word" not in refused.value.message


class OneToken:
    """A backend whose responses are of one token each."""

    full = False

    def __init__(self) -> None:
        self.started: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> OneTokenGeneration:
        if self.full:
            raise QueueFull("full", 1)
        self.started.append(request)
        return OneTokenGeneration([prompt.tokens for prompt in request.prompts for _ in range(request.n)])


def one_token() -> Any:
    return OneToken()


class OneTokenGeneration:
    def __init__(self, prompts: list[Any]) -> None:
        self.prompts, self.cached_tokens = prompts, [0] * len(prompts)
        self._tokens = 0
        self._ended: list[Ended] = []

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        self._tokens = len(self.prompts)
        yield [(index, Delta("a", [97], FinishReason.STOP)) for index in range(len(self.prompts))]

    def abort(self) -> None:
        while self._ended:
            self._ended.pop()(self._tokens, None)

    def on_end(self, ended: Ended) -> None:
        self._ended.append(ended)


def client_of(caller: Caller) -> Client:
    return Client("id", caller, {})


def ask(*texts: str, **changes: Any) -> GenerationRequest:
    prompts = [Prompt(text.encode()) for text in texts]
    return GenerationRequest(Origin("id"), prompts, 10, sampling=SamplingParams(), **changes)


async def start(quota: Quota, client: Client, backend: OneToken, request: GenerationRequest) -> Generation:
    """Checks and starts a request, as a server does."""
    quota.check(client, request)
    return await quota.start(client, cast("Backend", backend), request)


async def test_a_generation_costs_its_prompt_once_and_its_tokens_whoever_ends_it() -> None:
    rates, backend = rates_of(tokens_per_minute=100), one_token()
    quota = Quota(rates, max_prompt_tokens=50)

    async def left(caller: Caller) -> int:
        standing: dict[str, str] = {}
        await rates.reserve(caller, 0, standing)
        return int(standing["x-ratelimit-remaining-tokens"])

    generation = await start(quota, client_of(ANN), backend, ask("é" * 10, n=3))
    assert await left(ANN) == 100 - 20 - 30
    async for _ in generation:
        pass
    generation.abort()
    generation.abort()
    await settled(rates)
    assert await left(ANN) == 100 - 20 - 3
    generation = await start(quota, client_of(ANN), backend, ask("ab", "c"))
    generation.abort()
    await settled(rates)
    assert await left(ANN) == 77 - 3

    backend.full = True
    with pytest.raises(QueueFull):
        await start(quota, client_of(ANN), backend, ask("a"))
    await settled(rates)
    assert await left(ANN) == 74
    with pytest.raises(InvalidRequest, match="max_prompt_tokens"):
        await start(quota, client_of(BOB), backend, ask("a" * 51))
    assert await left(BOB) == 100


@pytest.mark.parametrize(
    ("caller", "option", "least"),
    [
        (ANN, 0, 0),
        (ANN, -3, -3),
        (by_key(Key(sha256="b" * 64)), 0, 0),
        (by_key(Key(sha256="b" * 64, top_priority=-5)), 0, -5),
        (by_key(Key(sha256="b" * 64, top_priority=2)), 0, 2),
    ],
)
async def test_nobody_goes_before_others_without_a_right_to_it(caller: Caller, option: int, least: int) -> None:
    quota, backend = Quota(rates_of(), None, option), one_token()
    await start(quota, client_of(caller), backend, ask("a", priority=least))
    with pytest.raises(Forbidden, match="top_priority") as refused:
        await start(quota, client_of(caller), backend, ask("a", priority=least - 1))
    assert refused.value.param == "priority"
    assert len(backend.started) == 1
