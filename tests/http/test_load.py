"""Many clients at once: nobody is lost, nobody waits for another, whoever leaves makes room."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from tests.conftest import RawStream, ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
MOST = 100_000  # tokens: far more than any stream here is let to come to
ENDLESS = {"prompt": "a", "max_tokens": MOST, "stream": True}
TOKENS = "bdh_generation_tokens_total"
ENDED = "bdh_request_success_total{finished_reason=length}"
STEPS = "bdh_batch_occupancy_count"
SLOTS, QUEUE = 2, 8


def begun(server: Server, number: int, **body: Any) -> list[RawStream]:
    """That many endless streams, each with its first token."""
    streams = [server.raw(ENDLESS | body) for _ in range(number)]
    for stream in streams:
        stream.read_until(b"data: ")
    return streams


def until_left(server: Server, before: dict[str, float]) -> None:
    """Until nothing runs any more, though nothing that began since `before` has come to its end."""
    server.until_idle()
    assert server.metrics().get(ENDED, 0) == before.get(ENDED, 0)


def texts(raw: bytes) -> tuple[dict[int, str], bool]:
    """The texts of a stream as it came over the wire, by their index, and whether it ended well."""
    payload = b"".join(dechunked(raw.partition(b"\r\n\r\n")[2]))
    frames = [frame.removeprefix(b"data: ") for frame in payload.split(b"\n\n")]
    found: dict[int, str] = {}
    for frame in frames[:-2]:
        (choice,) = json.loads(frame)["choices"]
        found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return found, frames[-2:] == [b"[DONE]", b""]


def dechunked(raw: bytes) -> Iterator[bytes]:
    begin = 0
    while (line := raw.index(b"\r\n", begin)) and (size := int(raw[begin:line], 16)):
        yield raw[line + 2 : line + 2 + size]
        begin = line + 2 + size + 2


async def test_64_streams_all_complete(server: Server) -> None:
    async def stream(client: openai.AsyncOpenAI, number: int) -> tuple[str, int]:
        chunks = await client.completions.create(
            model="bdh-shakespeare",
            prompt=f"Citizen {number}:\n",
            max_tokens=96,
            seed=number,
            stream=True,
            stream_options={"include_usage": True},
        )
        reasons, tokens = [], 0
        async for chunk in chunks:
            reasons += [choice.finish_reason for choice in chunk.choices]
            tokens += chunk.usage.completion_tokens if chunk.usage else 0
        return str(reasons[-1]), tokens

    before = server.metrics()
    async with asyncio.timeout(300), server.async_openai() as client:
        ends = await asyncio.gather(*(stream(client, number) for number in range(64)))
    after = server.metrics()
    assert ends == [("length", 96)] * 64
    assert after[ENDED] - before.get(ENDED, 0) == 64


def test_64_streams_share_every_step(server: Server) -> None:
    crowd = begun(server, 64)  # none of which ends before it is left
    before = server.metrics()
    server.until(lambda m: m[STEPS] > before[STEPS] + 1)
    after = server.metrics()
    assert after.get(ENDED, 0) == before.get(ENDED, 0)
    sequences = after["bdh_batch_occupancy_sum"] - before["bdh_batch_occupancy_sum"]
    # A scrape may come between the sum and the count of a step.
    assert abs(sequences / 64 - (after[STEPS] - before[STEPS])) <= 1
    for stream in crowd:
        stream.close()
    server.until_idle()


def test_a_newcomer_among_32_has_its_first_token_within_five_steps(server: Server) -> None:
    crowd = begun(server, 32)
    recorded = ((f"newcomer-{number}", steps_with(server, f"newcomer-{number}")) for number in range(100))
    for name, steps in recorded:
        waited = [step["sequences"] for step in steps if seen(name, step["sequences"]) != "decode"]
        if 0 < len(waited) < len(steps):  # from before it came to behind its first token
            break
    else:
        raise AssertionError("no newcomer came while steps were recorded")
    for stream in crowd:
        stream.close()
    server.until_idle()
    assert len(waited) <= 5
    assert all(len(sequences) >= 32 for sequences in waited)


def steps_with(server: Server, name: str) -> list[Any]:
    """Some steps from the first in which a new request is, or waits; none where it came too early or too late."""
    body = {"prompt": f"{name}:\n", "max_tokens": 3, "stream": True}
    with ThreadPoolExecutor(1) as pool:
        recording = pool.submit(server.http.get, "/watch/steps", params={"steps": 50, "seconds": 10})
        newcomer = server.raw(body, headers={"x-request-id": name})
        newcomer.read_all()
        newcomer.close()
        (engine,) = recording.result().json()["engines"]
    steps = dropwhile(lambda step: seen(name, [*step["sequences"], *step["waiting"]]) is None, engine["steps"])
    return list(takewhile(lambda step: seen(name, [*step["sequences"], *step["waiting"]]) is not None, steps))


def seen(name: str, sequences: list[Any]) -> str | None:
    """What a request does in a step: "prompt", "decode" or, where it is among those that wait, "wait"."""
    return next((each.get("phase", "wait") for each in sequences if each["request"] == name), None)


def test_50_clients_cut_off_in_mid_stream_free_their_slots(server: Server) -> None:
    before = server.metrics()
    streams = begun(server, 50)
    assert server.metrics()["bdh_num_requests_running"] == 50
    for number, stream in enumerate(streams):
        stream.close(reset=number % 2 == 0)
    until_left(server, before)
    name = "bdh_request_success_total{finished_reason=abort}"
    assert server.metrics()[name] - before.get(name, 0) == 50
    assert server.metrics()["bdh_state_slots_usage_perc"] == 0
    assert server.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_leaves_an_unstreamed_request_frees_its_slots(tiny: Server, path: str, reset: bool) -> None:
    tiny.until_idle()
    before = tiny.metrics()
    ask = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    client = tiny.raw(ask | {"max_tokens": MOST, "n": 3}, path)
    tiny.until(lambda m: m["bdh_num_requests_running"] == 3)
    client.close(reset)
    until_left(tiny, before)
    tiny.until(lambda m: m["bdh_http_requests_in_flight"] == 1)


def test_a_client_that_leaves_while_it_waits_leaves_the_queue(narrow: Server) -> None:
    before = narrow.metrics()
    holders = begun(narrow, SLOTS)
    waiting = [narrow.raw(ENDLESS) for _ in range(3)]
    narrow.until(lambda m: m["bdh_num_requests_waiting"] == 3)
    waiting.pop().close()
    narrow.until(lambda m: m["bdh_num_requests_waiting"] == 2)
    assert narrow.metrics()["bdh_num_requests_running"] == SLOTS
    for stream in (*holders, *waiting):
        stream.close()
    until_left(narrow, before)


def test_the_openai_client_can_leave_a_stream(tiny: Server) -> None:
    before = tiny.metrics()
    with tiny.openai() as client:
        stream = client.completions.create(model="tiny", prompt="a", max_tokens=MOST, stream=True)
        next(iter(stream))
        stream.close()
    until_left(tiny, before)


def test_a_client_that_does_not_read_holds_nobody_up_and_loses_nothing(tiny: Server, long_name: str) -> None:
    """Its responses come in frames of 4 KiB, 16 MiB in all: far more than the buffers on the way hold."""
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 400, "n": 10, "seed": 1}
    sleeper = tiny.raw(body | {"model": long_name, "stream": True}, receive_buffer=4096)
    sleeper.read_until(b"data: ")
    whole = tiny.complete(**body)["choices"]
    tiny.until_idle()  # all is generated, although nobody has taken it
    responses, done = texts(sleeper.read_all())
    sleeper.close()
    assert done
    assert responses == {choice["index"]: choice["text"] for choice in whole}
    tiny.until(lambda m: m["bdh_http_requests_in_flight"] == 1)


def test_a_client_that_never_reads_can_leave(tiny: Server, long_name: str) -> None:
    before = tiny.metrics()
    sleeper = tiny.raw(ENDLESS | {"model": long_name, "n": 10}, receive_buffer=4096)
    tiny.until(lambda m: m[TOKENS] > before[TOKENS] + 4000)
    sleeper.close(reset=True)
    until_left(tiny, before)
    tiny.until(lambda m: m["bdh_http_requests_in_flight"] == 1)


@pytest.fixture(scope="module")
def narrow(serve: ServeFactory) -> Iterator[Server]:
    """Runs SLOTS sequences at a time, and lets QUEUE wait."""
    options = (f"scheduler.max_running={SLOTS}", f"scheduler.max_queued_requests={QUEUE}")
    with serve(*options, model=TINY) as server:
        yield server


async def test_more_requests_than_slots_all_complete(narrow: Server) -> None:
    async with asyncio.timeout(300), narrow.async_openai() as client:
        responses = await asyncio.gather(
            *(
                client.completions.create(model="tiny", prompt="ab"[: 1 + n % 2], max_tokens=20 + n, seed=1)
                for n in range(QUEUE)
            )
        )
    assert [response.usage.completion_tokens for response in responses if response.usage] == [
        20 + n for n in range(QUEUE)
    ]
    longest = {n % 2: responses[n].choices[0].text for n in range(QUEUE)}
    for n, response in enumerate(responses):
        assert longest[n % 2].startswith(response.choices[0].text.rstrip("\ufffd"))
    metrics = narrow.metrics()
    assert metrics["bdh_batch_occupancy_bucket{le=2.0}"] == metrics["bdh_batch_occupancy_count"]


def test_one_request_may_ask_for_more_sequences_than_there_are_slots(narrow: Server) -> None:
    assert narrow.complete(prompt=["a"] * 3, n=2, max_tokens=3)["usage"]["completion_tokens"] == 18


def test_beyond_the_queues_bound_is_refused_and_nothing_is_lost(narrow: Server) -> None:
    holders = begun(narrow, SLOTS)
    waiting = [narrow.raw({"prompt": "a", "max_tokens": 10, "seed": 4, "stream": True}) for _ in range(QUEUE)]
    narrow.until(lambda m: m["bdh_num_requests_waiting"] == QUEUE)
    for streamed in (False, True):
        assert narrow.refusal({"prompt": "a", "stream": streamed}, status=429)["code"] == "queue_full"
    with narrow.openai() as client, pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert caught.value.code == "queue_full"
    metrics = narrow.metrics()
    assert (metrics["bdh_num_requests_running"], metrics["bdh_num_requests_waiting"]) == (SLOTS, QUEUE)
    assert metrics["bdh_admission_rejections_total{reason=queue_full}"] == 3
    for holder in holders:
        holder.close()
    responses = [texts(stream.read_all()) for stream in waiting]
    for stream in waiting:
        stream.close()
    assert responses == [({0: narrow.text(prompt="a", max_tokens=10, seed=4)}, True)] * QUEUE
    narrow.until_idle()
