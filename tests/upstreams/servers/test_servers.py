"""A real Gradio app and a real KServe model server behind a gateway: `make upstream-servers`.

They run with the Python of .venv-upstreams, which has nothing of this project; the gateway with this one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI

from tests.conftest import HANG_SECONDS, ServeFactory, Server, eventually, free_port

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".venv-upstreams" / "bin" / "python"
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
QUESTION: Any = [{"role": "user", "content": "How are you?"}]
TURNS: Any = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, *QUESTION]


@contextlib.contextmanager
def running(program: str, *arguments: object) -> Iterator[None]:
    """A server of another project."""
    process = subprocess.Popen(
        [str(PYTHON), str(HERE / program), *map(str, arguments)],
        env={**os.environ, **ENVIRONMENT},
        stdout=sys.stderr,
        stderr=sys.stderr,
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def gateway(serve: ServeFactory) -> Iterator[Server]:
    app, http, grpc = free_port(), free_port(), free_port()
    common: dict[str, Any] = {"kind": "gradio", "url": f"http://127.0.0.1:{app}", "failures": 1000}
    inputs = ["{message}", "{history}", "{system}", "{temperature}", "{max_tokens}"]
    defaults = {"temperature": 0.7, "max_tokens": 2048}
    kserve: dict[str, Any] = {"kind": "kserve", "endpoints": [f"127.0.0.1:{grpc}"], "model": "parrot"}
    upstreams = [
        {"id": "chat", "api": "chat", "html": None, "inputs": ["{message}"], **common},
        {"id": "turns", "api": "turns", "html": None, **common},
        {
            **{"id": "bharatgen", "api": "chat_fn_1", "inputs": inputs, "history": "pairs", "system": "Be kind."},
            **{"defaults": defaults, "reasoning": True, **common},
        },
        {"id": "fails", "api": "fails", **common},
        {"id": "slow", "api": "slow", **common},
        {"id": "parrot", **kserve},
        {"id": "parrot-whole", "streaming": False, **kserve},
    ]
    with running("gradio_app.py", app), running("kserve_server.py", http, grpc):
        eventually(lambda: answers(f"http://127.0.0.1:{app}/gradio_api/app_id"))
        eventually(lambda: answers(f"http://127.0.0.1:{http}/v2/health/ready"))
        with serve(f"upstreams={json.dumps(upstreams)}", verb="gateway") as server:
            yield server


@pytest.fixture(scope="module")
async def client(gateway: Server) -> AsyncIterator[AsyncOpenAI]:
    async with gateway.async_openai() as client:
        yield client


async def said(client: AsyncOpenAI, model: str, messages: Any = QUESTION, **fields: Any) -> list[str]:
    """The pieces of a stream."""
    stream = await client.chat.completions.create(model=model, messages=messages, stream=True, extra_body=fields)
    return [event.choices[0].delta.content or "" async for event in stream]


async def test_a_chat_interface_streams(client: AsyncOpenAI) -> None:
    for model, turns in (("chat", 0), ("turns", 2)):  # an interface keeps the history itself, by its sessions
        pieces = await said(client, model, TURNS)
        assert "".join(pieces) == f"You said 'How are you?' after {turns} turns; None; None; None. "
        assert len([piece for piece in pieces if piece]) > 3


async def test_thoughts_and_latencies_are_taken_out(client: AsyncOpenAI) -> None:
    text = "You said 'How are you?' after 1 turns; Be kind.; 0.25; 2048."
    pieces = await said(client, "bharatgen", TURNS, temperature=0.25)
    assert "".join(pieces) == text
    assert len([piece for piece in pieces if piece]) > 3
    whole = await client.chat.completions.create(model="bharatgen", messages=TURNS, temperature=0.25)
    message = whole.choices[0].message
    assert (message.content, getattr(message, "reasoning_content")) == (text, "Let me see.")  # noqa: B009


async def test_errors_of_the_app_are_events_with_its_words(client: AsyncOpenAI) -> None:
    with pytest.raises(APIStatusError) as failed:
        await client.chat.completions.create(model="fails", messages=QUESTION)
    assert failed.value.status_code == 502
    assert "No luck today" in failed.value.message
    with pytest.raises(Exception, match="No luck today"):
        await said(client, "fails")


async def status(http: httpx.AsyncClient, seconds: float) -> int:
    """The status of a stream that is left after so many seconds, or at once if it is none; 0 while it waits."""
    body = {"model": "slow", "messages": QUESTION, "stream": True}
    try:
        async with asyncio.timeout(seconds), http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code == 200:
                await asyncio.sleep(HANG_SECONDS)
            assert "'slow'" in (await response.aread()).decode()
            return response.status_code
    except TimeoutError:
        return 0


async def test_a_full_queue_is_to_be_asked_later_and_who_leaves_makes_room(gateway: Server) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=HANG_SECONDS) as http:
        for _ in range(2):
            # Of the app's queue, one runs, and one waits; there is no room for more.
            found = await asyncio.gather(*(status(http, 5) for _ in range(6)))
            assert 503 in found
            assert 0 in found
            async with asyncio.timeout(HANG_SECONDS):
                while await status(http, 0.5) == 503:  # noqa: ASYNC110 - the app notices between two of its texts
                    await asyncio.sleep(0.05)


async def test_a_predictor_of_kserve_streams_and_is_asked_for_all_at_once(client: AsyncOpenAI) -> None:
    for model in ("parrot", "parrot-whole"):
        whole = await client.completions.create(model=model, prompt="one two three four", max_tokens=3)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("one two three", "length")
        stream = await client.completions.create(model=model, prompt="one two three four", stream=True)
        texts = [event.choices[0].text async for event in stream]
        assert "".join(texts) == "one two three four"
        assert (len([text for text in texts if text]) > 1) == (model == "parrot")
    with pytest.raises(APIStatusError) as refused:
        await client.completions.create(model="parrot", prompt="x", seed=1)
    assert refused.value.status_code == 400


async def test_their_health_checks_find_them_well(gateway: Server, client: AsyncOpenAI) -> None:
    found = await asyncio.to_thread(gateway.metrics)
    up = [value for name, value in found.items() if name.startswith("bdh_upstream_endpoint_up")]
    assert up == [1.0] * 7
