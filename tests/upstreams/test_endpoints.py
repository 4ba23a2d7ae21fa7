"""Several endpoints of one upstream: which is asked, who takes over, and when a lost stream goes on elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc
import pytest
from hypothesis import given, settings, strategies as st
from pydantic import TypeAdapter
from tritonclient.grpc import service_pb2

from bdh_batch.errors import QueueFull, RunTimeout, Unavailable, UpstreamFailed
from bdh_batch.messages import FinishReason, Usage
from bdh_batch.upstreams.config import OpenAIUpstream
from bdh_batch.upstreams.continuation import Continuation
from bdh_batch.upstreams.endpoints import Endpoint, Endpoints
from bdh_batch.upstreams.protocol import EndpointFacts, Fault, FaultKind, Piece, TextRequest
from tests.upstreams.fakes import Connection, Script, Web, chunk, tensor, token, web, worker
from tests.upstreams.support import Gateway, upstream

WORDS = [f"w{number} " for number in range(24)]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Probes:
    """A connector of which only health checks are asked."""

    fault: Fault | None = None

    async def probe(self, address: str) -> EndpointFacts:
        if self.fault is not None:
            raise self.fault
        return EndpointFacts()


def endpoints(count: int = 2, **options: Any) -> tuple[Endpoints, Clock, Probes]:
    urls = [f"http://host{number}:1" for number in range(count)]
    chosen = TypeAdapter(OpenAIUpstream).validate_python({"id": "up", "kind": "openai", "endpoints": urls, **options})
    clock, probes = Clock(), Probes()
    connector: Any = probes
    return Endpoints(chosen, connector, clock), clock, probes


def fail(of: Endpoints, endpoint: Endpoint, kind: FaultKind = FaultKind.CLOSED) -> None:
    with contextlib.suppress(Fault), of.asking(endpoint):
        raise Fault(kind)


def test_the_least_busy_is_asked_and_of_several_the_one_that_waited_longest() -> None:
    of, _, _ = endpoints(3)
    with contextlib.ExitStack() as stack:
        order = []
        for _ in range(6):
            endpoint = of.choose()
            assert endpoint is not None
            order.append(endpoint.address)
            stack.enter_context(of.asking(endpoint))
        assert order == [each.address for each in of.all] * 2
        assert [each.outstanding for each in of.all] == [2, 2, 2]
    assert [each.outstanding for each in of.all] == [0, 0, 0]


def test_failures_in_a_row_leave_an_endpoint_alone_for_longer_and_longer() -> None:
    of, clock, _ = endpoints(1, failures=2, backoff_seconds=1, max_backoff_seconds=3)
    (endpoint,) = of.all
    fail(of, endpoint)
    of.succeeded(endpoint)
    fail(of, endpoint)
    assert of.choose() is endpoint
    for seconds in (1, 2, 3, 3):
        fail(of, endpoint)
        clock.now += seconds - 0.01
        assert of.choose() is None
        assert of.ready() is not None
        assert of.retry_after >= 1
        clock.now += 0.01
        assert of.choose() is endpoint
    with of.asking(endpoint):
        assert of.choose() is None  # one request tries it
        of.succeeded(endpoint)
    assert of.choose() is endpoint


@pytest.mark.parametrize("kind", [FaultKind.REFUSED, FaultKind.REWRITTEN, FaultKind.ERROR, FaultKind.TOO_LARGE])
def test_what_is_not_its_fault_does_not_count(kind: FaultKind) -> None:
    of, _, _ = endpoints(1, failures=1)
    fail(of, of.all[0], kind)
    assert of.choose() is of.all[0]


async def test_an_endpoint_that_fails_its_health_check_is_not_asked_until_it_is_well() -> None:
    of, _, probes = endpoints(1)
    probes.fault = Fault(FaultKind.CONNECT)
    await of.check(of.all[0])
    assert of.choose() is None
    probes.fault = None
    await of.check(of.all[0])
    assert of.choose() is of.all[0]


async def fine(connection: Connection) -> None:
    await connection.events(chunk("fine", "stop"))


async def drops(connection: Connection) -> None:
    connection.writer.transport.abort()


async def begins(connection: Connection) -> None:
    await connection.events(chunk("be"), done=False)


@contextlib.asynccontextmanager
async def two(first: Script, second: Script) -> AsyncIterator[tuple[Web, Web]]:
    async with web(first) as one, web(second) as other:
        yield one, other


def between(*fakes: Web) -> AbstractAsyncContextManager[Gateway]:
    return upstream(kind="openai", endpoints=[each.url for each in fakes])


async def test_another_endpoint_takes_over_before_the_first_token() -> None:
    async with two(drops, fine) as (one, other), upstream(kind="openai", endpoints=[one.url, other.url]) as gateway:
        got = await gateway.ask()
    assert (got.text, got.error) == ("fine", None)
    assert (len(one.asked), len(other.asked)) == (1, 1)
    assert gateway.seen.failures == {"closed": 1}
    assert gateway.seen.moved == {False: 1}


async def test_after_the_first_token_a_stream_of_strangers_ends_with_an_error() -> None:
    async with two(begins, fine) as (one, other), between(one, other) as gateway:
        got = await gateway.ask()
    assert got.text == "be"
    assert isinstance(got.error, UpstreamFailed)
    assert not other.asked


async def test_a_request_is_not_tried_more_often_than_the_settings_say() -> None:
    async with contextlib.AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(web(drops)) for _ in range(4)]
        gateway = await stack.enter_async_context(
            upstream(kind="openai", endpoints=[each.url for each in fakes], max_failovers=2)
        )
        got = await gateway.ask()
    assert isinstance(got.error, UpstreamFailed)
    assert sum(len(each.asked) for each in fakes) == 3


async def test_when_all_are_down_requests_are_refused_at_once() -> None:
    async with web(fine) as fake, upstream(checked=True, kind="openai", url=fake.url) as gateway:
        fake.healthy = False
        await gateway.backend.endpoints.check(gateway.backend.endpoints.all[0])
        with pytest.raises(Unavailable) as refused:
            await gateway.ask()
    assert "'up'" in refused.value.message
    assert not fake.asked


async def test_a_request_ends_at_its_own_deadline() -> None:
    async def silent(connection: Connection) -> None:
        await connection.until_left()

    async with web(silent) as fake, upstream(kind="openai", url=fake.url, deadline=0.2) as gateway:
        got = await gateway.ask()
    assert isinstance(got.error, RunTimeout)


async def test_no_more_requests_are_under_way_than_the_settings_say_and_tenants_take_turns() -> None:
    begun, release, order = asyncio.Event(), asyncio.Event(), []

    async def script(connection: Connection) -> None:
        order.append(connection.asked.body["prompt"])
        begun.set()
        await release.wait()
        await connection.events(chunk("ok", "stop"))

    async with web(script) as fake, upstream(kind="openai", url=fake.url, max_requests=1) as gateway:
        waiting = [
            asyncio.create_task(gateway.ask(prompt, tenant=tenant))
            for prompt, tenant in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"))
        ]
        await asyncio.wait_for(begun.wait(), 300)
        release.set()
        assert [(await each).text for each in waiting] == ["ok"] * 4
    assert order == ["a1", "a2", "b1", "a3"]


async def test_a_request_that_waits_too_long_for_its_turn_is_refused() -> None:
    async def silent(connection: Connection) -> None:
        await connection.until_left()

    options: dict[str, Any] = {"kind": "openai", "max_requests": 1, "first_token_seconds": 0.3, "connect_seconds": 5}
    async with web(silent) as fake, upstream(url=fake.url, **options) as gateway:
        first = await gateway.start()
        got = await gateway.ask()
        first.abort()
    assert isinstance(got.error, QueueFull)
    assert "max_requests" in got.error.message


async def test_a_drain_that_runs_out_of_time_ends_requests_with_an_error() -> None:
    async def silent(connection: Connection) -> None:
        await connection.until_left()

    async with web(silent) as fake, upstream(kind="openai", url=fake.url) as gateway:
        asking = asyncio.create_task(gateway.ask())
        async with asyncio.timeout(300):
            while not fake.asked:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await gateway.backend.drain(0.01)
        got = await asking
    assert isinstance(got.error, Unavailable)
    assert "shutting down" in got.error.message


async def test_many_choices_are_as_many_requests_and_one_that_fails_ends_itself() -> None:
    async def script(connection: Connection) -> None:
        if connection.asked.body["seed"] == 7:
            await connection.events(chunk("x"), done=False)
        else:
            await connection.events(chunk(str(connection.asked.body["seed"]), "stop"))

    async with web(script) as fake, upstream(kind="openai", url=fake.url, max_requests=16) as gateway:
        got = await gateway.ask(n=300, seed=0)
    assert isinstance(got.error, UpstreamFailed)
    assert [text for number, text in enumerate(got.texts) if number != 7] == [str(n) for n in range(300) if n != 7]


# Servers like this one: a stream whose endpoint is lost goes on at another one.


def model(request: Any) -> list[tuple[str, int]]:
    """The texts and token ids of a deterministic model: those behind the prompt that it was given."""
    (prompt,) = request.inputs
    done = max(0, len(prompt.contents.int_contents) - 2)
    most = request.parameters["max_tokens"].int64_param
    return [(WORDS[number], 100 + number) for number in range(done, done + most)]


OURS = ("bdh_batch", "f1")  # what a server like ours calls itself, and its model


def ours(cut: int | None = None, words: Sequence[tuple[str, str]] = ()) -> Any:
    """A worker like ours; `cut`: tokens after which its streams break off. `words`: what it says instead of others."""

    async def script(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        for number, (text, id) in enumerate(model(request)):
            if number == cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")
            yield token(request, dict(words).get(text, text), "null", tensor("token_ids", [id], "INT32"))
        known = len(request.inputs[0].contents.int_contents) or 2  # of its text, too
        usage = tensor("prompt_tokens", known, "INT32")
        yield token(request, "", "length", tensor("token_ids", [], "INT32", [0]), usage)

    return script


def prompt_ids(request: Any) -> Any:
    outputs = [tensor("prompt_token_ids", [1, 2], "INT32", [2])]
    return service_pb2.ModelInferResponse(id=request.id, outputs=outputs)


@pytest.mark.parametrize("cut", [0, 1, 3, 7, 19])
@pytest.mark.parametrize("penalty", [0.0, 0.5])
async def test_a_lost_stream_goes_on_behind_its_tokens_as_if_nothing_had_been(cut: int, penalty: float) -> None:
    async with (
        worker(ours(cut), prompt_ids, *OURS) as one,
        worker(ours(), prompt_ids, *OURS) as other,
        upstream(checked=True, kind="kserve", endpoints=[one.address, other.address]) as gateway,
    ):
        got = await gateway.ask("hi", max_tokens=20, **({"presence_penalty": penalty} if penalty else {}))
    assert got.error is None
    assert (got.text, got.reasons) == ("".join(WORDS[:20]), [FinishReason.LENGTH])
    assert got.usage == Usage(2, 20)
    assert gateway.seen.moved == {cut > 0: 1}
    first, again = one.asked[0], other.asked[-1]
    assert first.parameters["seed"].int64_param == again.parameters["seed"].int64_param == 7
    kept = list(again.inputs[0].contents.int_contents)[2:]
    # A penalty counts what was generated, and not a prompt: then all of it is generated again.
    assert len(kept) == (0 if penalty or not cut else max(1, cut - 4))
    assert again.parameters["max_tokens"].int64_param == 20 - len(kept)


async def test_where_a_character_lies_across_tokens_all_is_generated_again() -> None:
    """A token has the end of a text and the first byte of a character: behind it, that byte would be missing."""

    def say(number: int, continued: bool) -> str:
        return "?" if continued and number == 6 else WORDS[number]

    async def script(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        continued = len(request.inputs[0].contents.int_contents) > 2
        for number, (_, id) in enumerate(model(request), len(request.inputs[0].contents.int_contents[2:])):
            yield token(request, say(number, continued), "null", tensor("token_ids", [id], "INT32"))
        yield token(request, "", "length", tensor("token_ids", [], "INT32", [0]))

    async with (
        worker(ours(10), prompt_ids, *OURS) as one,
        worker(script, prompt_ids, *OURS) as other,
        upstream(checked=True, kind="kserve", endpoints=[one.address, other.address]) as gateway,
    ):
        got = await gateway.ask("hi", max_tokens=20)
    assert (got.text, got.error) == ("".join(WORDS[:20]), None)
    assert got.usage.completion_tokens == 20
    assert len(other.asked) == 3  # for the prompt's tokens, behind them, and from the start


async def test_an_endpoint_that_would_go_on_differently_is_not_believed() -> None:
    async with (
        worker(ours(10), prompt_ids, *OURS) as one,
        worker(ours(None, [(WORDS[8], "other ")]), prompt_ids, *OURS) as other,
        upstream(checked=True, kind="kserve", endpoints=[one.address, other.address]) as gateway,
    ):
        got = await gateway.ask("hi", max_tokens=20)
    assert got.text == "".join(WORDS[:10])
    assert isinstance(got.error, UpstreamFailed)
    assert got.error.code == "upstream_differs"


@pytest.mark.parametrize(
    ("fingerprints", "goes_on"),
    [
        (("f1", "f2"), False),  # of another model
        (("", ""), False),  # of a gateway, whose upstreams may be anything
        (("f1", "f2", "f1"), True),  # the one that is alike is asked, and not the next one
    ],
)
async def test_a_stream_goes_on_only_where_the_same_is_generated(fingerprints: Sequence[str], goes_on: bool) -> None:
    async with contextlib.AsyncExitStack() as stack:
        scripts = [ours(3), *[ours()] * (len(fingerprints) - 1)]
        workers = [
            await stack.enter_async_context(worker(script, prompt_ids, "bdh_batch", fingerprint))
            for script, fingerprint in zip(scripts, fingerprints)
        ]
        addresses = [each.address for each in workers]
        gateway = await stack.enter_async_context(upstream(checked=True, kind="kserve", endpoints=addresses))
        got = await gateway.ask("hi", max_tokens=20)
    assert ("seed" in workers[0].asked[0].parameters) == bool(fingerprints[0])
    assert not workers[1].asked
    assert got.text == "".join(WORDS[:20] if goes_on else WORDS[:3])
    assert getattr(got.error, "code", None) == (None if goes_on else "upstream_closed")


async def test_before_the_first_token_an_endpoint_with_another_model_is_asked_from_the_start() -> None:
    async with (
        worker(ours(0), prompt_ids, "bdh_batch", "f1") as one,
        worker(ours(), prompt_ids, "bdh_batch", "f2") as other,
        upstream(checked=True, kind="kserve", endpoints=[one.address, other.address]) as gateway,
    ):
        got = await gateway.ask("hi", max_tokens=20)
    assert (got.text, got.error) == ("".join(WORDS[:20]), None)
    assert [len(each.asked) for each in (one, other)] == [1, 1]


async def test_text_that_is_held_back_for_a_stop_string_is_of_one_endpoint() -> None:
    """One endpoint is lost when the client has nothing of its text yet: another one does not begin behind it."""

    async def begins(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        yield token(request, "EN", "null", tensor("token_ids", [], "INT32", [0]))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "killed")

    async def ends(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        yield token(request, "Dover", "stop")

    async with (
        worker(begins) as one,
        worker(ends) as other,
        upstream(checked=True, kind="kserve", endpoints=[one.address, other.address]) as gateway,
    ):
        got = await gateway.ask("hi", stop=["END"])
    assert isinstance(got.error, UpstreamFailed)


def test_endpoints_that_the_settings_call_ours_are_alike_from_the_start() -> None:
    for said, ours_and_alike in ((True, (True, True)), (False, (False, False)), (None, (False, False))):
        of, _, _ = endpoints(ours=said)
        facts = {each.facts for each in of.all}
        assert [(each.ours, each.fingerprint is not None) for each in facts] == [ours_and_alike]


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.sampled_from(["", "a", "bc", "é", " x "]), min_size=1, max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    continuable=st.booleans(),
)
def test_whatever_is_lost_and_wherever_the_text_is_the_same(
    texts: list[str], cuts: list[int], sizes: list[int], continuable: bool
) -> None:
    """A model of fixed tokens, in responses of several tokens each, lost again and again."""
    fields: dict[str, Any] = {"max_tokens": len(texts)} | ({} if continuable else {"presence_penalty": 1})
    record = Continuation(TextRequest("r", [1, 2, 3], fields=fields, ours=True))
    request, said, tokens = record.request, "", 0
    for cut in [*cuts, None]:
        prompt = request.prompt
        assert isinstance(prompt, list)
        begin = at = len(prompt) - 3
        assert request.fields["max_tokens"] == len(texts) - begin
        number = 0
        while at < len(texts) and (cut is None or at - begin < cut):
            end = min(len(texts), at + sizes[number % len(sizes)])
            ids = [100 + each for each in range(at, end)]
            piece = record.take(Piece("".join(texts[at:end]), ids, len(ids)))
            said += piece.text
            tokens += piece.count or 0
            at, number = end, number + 1
            assert "".join(texts).startswith(said)
        if cut is not None:
            request = record.next_request()
            if continuable and isinstance(request.prompt, list):
                assert request.prompt[3:] == [100 + each for each in range(len(request.prompt) - 3)]
    assert said == "".join(texts)
    assert tokens == len(texts)
