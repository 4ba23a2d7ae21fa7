"""ModelStreamInfer: many requests on one call or one, and what becomes of them when their client is unkind."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import tritonclient.grpc.aio
from tritonclient.grpc import service_pb2 as pb

from tests.kserve.support import SERVICE, by_request, outputs, request, said, triton_input

if TYPE_CHECKING:
    from tests.kserve.support import Worker

LONG: dict[str, Any] = {"max_tokens": 100_000, "ignore_eos": True}


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Until it is set, a client has more to send."""
    event = threading.Event()
    yield event
    event.set()


def test_a_client_that_sends_one_and_ends_is_served(worker: Worker) -> None:
    method = worker.channel.unary_stream(
        f"{SERVICE}ModelStreamInfer", response_deserializer=pb.ModelStreamInferResponse.FromString
    )
    responses = list(method(request("tiny", id="only", max_tokens=9, seed=4).SerializeToString()))
    (steps,) = by_request(responses).values()
    assert said(steps) == worker.server.text(prompt="ROMEO:", max_tokens=9, seed=4)
    assert steps[-1]["completion_tokens"] == [9]
    assert steps[-1]["prompt_tokens"] == [6]
    last = [each.infer_response.parameters["triton_final_response"].bool_param for each in responses]
    assert last == [False] * (len(last) - 1) + [True]


def test_one_response_has_one_token(worker: Worker) -> None:
    asked = request("tiny", max_tokens=6, seed=1, structured_outputs='{"regex": "[a-z]{20}"}')
    (steps,) = by_request(worker.stream([asked])).values()
    assert [len(each["token_ids"]) for each in steps] == [1] * 6 + [0]
    assert [len(each["token"][0]) for each in steps] == [1] * 6 + [0]


def test_several_requests_at_once_keep_apart(worker: Worker) -> None:
    requests = [request("tiny", id=str(seed), max_tokens=12, seed=seed) for seed in range(20)]
    found = by_request(worker.stream(requests))
    assert {id: said(steps) for id, steps in found.items()} == {
        str(seed): worker.server.text(prompt="ROMEO:", max_tokens=12, seed=seed) for seed in range(20)
    }


def test_an_error_is_a_response_of_its_own(worker: Worker) -> None:
    requests = [
        request("tiny", id="good", max_tokens=3),
        request("tiny", id="bad", max_tokens=3, temperature=9.0),
        b"\xff\xff",
        request("none", id="unknown"),
        request("tiny", id="later", max_tokens=3),
    ]
    responses = list(worker.stream(requests))
    errors = {each.infer_response.id: each.error_message for each in responses if each.error_message}
    assert errors.keys() == {"bad", "", "unknown"}
    assert "temperature" in errors["bad"]
    assert "no ModelInferRequest" in errors[""]
    assert "does not exist" in errors["unknown"]
    found = by_request(each for each in responses if not each.error_message)
    assert found.keys() == {"good", "later"}
    assert all(steps[-1]["finish_reason"] == ["length"] for steps in found.values())


def test_by_tritonclient(worker: Worker) -> None:
    came: queue.Queue[Any] = queue.Queue()
    worker.triton.start_stream(lambda result, error: came.put((result, error)))
    inputs = [triton_input("prompt", "BYTES", ["a"]), triton_input("max_tokens", "INT32", [5])]
    worker.triton.async_stream_infer("tiny", inputs, enable_empty_final_response=True, parameters={"seed": 2})
    text, final = b"", False
    while not final:
        result, error = came.get(timeout=300)
        assert error is None
        text += result.as_numpy("token")[0]
        final = result.get_response().parameters["triton_final_response"].bool_param
    worker.triton.stop_stream()
    assert text.decode() == worker.server.text(prompt="a", max_tokens=5, seed=2)


async def test_by_the_async_client(worker: Worker) -> None:
    inputs = [triton_input("prompt", "BYTES", ["a"]), triton_input("max_tokens", "INT32", [5])]

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for seed in range(3):
            of = {"model_name": "tiny", "inputs": inputs, "request_id": str(seed), "parameters": {"seed": seed}}
            yield of

    texts: dict[str, bytes] = {}
    async with tritonclient.grpc.aio.InferenceServerClient(worker.address) as client:
        async for result, error in client.stream_infer(requests()):
            assert error is None
            id = result.get_response().id
            texts[id] = texts.get(id, b"") + result.as_numpy("token")[0]
    assert {id: text.decode() for id, text in texts.items()} == {
        str(seed): worker.server.text(prompt="a", max_tokens=5, seed=seed) for seed in range(3)
    }


def test_several_prompts_have_their_indexes(worker: Worker) -> None:
    asked = request("tiny", ["ab", "c"], max_tokens=7, seed=3, n=2)
    (steps,) = by_request(worker.stream([asked])).values()
    texts = [said([step for step in steps if step["index"] == [index]]) for index in range(4)]
    expected = worker.server.complete(prompt=["ab", "c"], max_tokens=7, seed=3, n=2)["choices"]
    assert texts == [choice["text"] for choice in expected]
    assert [step["completion_tokens"] for step in steps if "completion_tokens" in step] == [[28]]


def test_a_stream_can_be_asked_for_a_whole_response(worker: Worker) -> None:
    asked = request("tiny", max_tokens=7, seed=3, stream=False)
    (response,) = worker.stream([asked])
    assert outputs(response.infer_response)["text"] == [worker.server.text(prompt="ROMEO:", max_tokens=7, seed=3)]


def test_several_tokens_can_come_in_one_response(worker: Worker) -> None:
    asked = request("tiny", max_tokens=9, seed=1, ignore_eos=True, stream_options='{"chunk_tokens": 4}')
    (steps,) = by_request(worker.stream([asked])).values()
    assert said(steps) == worker.server.text(prompt="ROMEO:", max_tokens=9, seed=1, ignore_eos=True)
    assert len(steps) <= 4


def test_thousands_of_requests_on_one_call(worker: Worker) -> None:
    """No more of them at a time than the option says, and each has its end."""
    requests = (request("tiny", ["a"], str(number), max_tokens=1) for number in range(2000))
    ends = [each for each in by_request(worker.stream(requests)).values() if each[-1]["finish_reason"] == ["length"]]
    assert len(ends) == 2000


def test_a_cancelled_call_ends_all_that_it_started(worker: Worker, held: threading.Event) -> None:
    def requests() -> Iterator[Any]:
        yield from (request("tiny", id=str(number), **LONG) for number in range(6))
        held.wait()

    call = worker.stream(requests())
    seen: set[str] = set()
    while len(seen) < 6:
        seen.add(next(call).infer_response.id)
    call.cancel()
    worker.server.until_idle()


async def test_calls_that_are_cancelled_while_they_are_written_to_are_no_faults(worker: Worker) -> None:
    raw = request("tiny", **LONG).SerializeToString()
    async with grpc.aio.insecure_channel(worker.address) as channel:
        stream = channel.unary_stream(f"{SERVICE}ModelStreamInfer")

        async def leave(turn: asyncio.Semaphore) -> None:
            async with turn:
                call = stream(raw)
                assert await call.read()
                call.cancel()

        turn = asyncio.Semaphore(32)
        await asyncio.gather(*(leave(turn) for _ in range(300)))
    worker.server.until_idle()
    assert " ERROR " not in worker.server.log


def test_the_deadline_of_a_call_is_that_of_its_requests(worker: Worker) -> None:
    """Also of those where the server sees it first, as it does for some of many."""

    def status(_number: int) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as refused:
            list(worker.stream([request("tiny", **LONG)], timeout=0.4))
        return refused.value.code()

    with ThreadPoolExecutor(16) as threads:
        assert set(threads.map(status, range(16))) == {grpc.StatusCode.DEADLINE_EXCEEDED}
    worker.server.until_idle()


def test_a_client_that_reads_nothing_holds_nobody_up(worker: Worker, held: threading.Event) -> None:
    """Its text waits for it, merged; others are served meanwhile."""

    def requests() -> Iterator[Any]:
        yield request("tiny", max_tokens=1200, ignore_eos=True, seed=5)
        held.wait()

    call = worker.stream(requests())
    for seed in range(3):
        assert worker.infer(request("tiny", max_tokens=5, seed=seed))["completion_tokens"] == [5]
    worker.server.until_idle()
    steps = []
    for response in call:
        steps.append(outputs(response.infer_response))
        if response.infer_response.parameters["triton_final_response"].bool_param:
            break
    assert said(steps) == worker.server.text(prompt="ROMEO:", max_tokens=1200, ignore_eos=True, seed=5)
