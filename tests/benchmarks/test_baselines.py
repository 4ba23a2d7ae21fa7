"""The baselines as servers of their own: what they generate is what ours generates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import orjson
import pytest

from benchmarks.served import Served, served
from benchmarks.server.baselines.__main__ import KINDS
from tests.conftest import Server
from tests.kernels.support import CONFORMANCE

PROMPTS = ["To be, or not", "a", "Once more unto the breach, dear friends", "x" * 70]
LENGTHS = [3, 24, 9, 15]
REFUSED = {"priority": {"priority": 1}, "echo": {"echo": True, "logprobs": 1}}


@pytest.fixture(scope="module")
def baselines(forked_servers: None) -> Iterator[dict[str, Served]]:
    """All of them, started side by side, with steps so short that prompts are cut and batches filled."""
    options = (f"model.path={CONFORMANCE / 'tiny'}", "scheduler.prefill_tokens=32")
    with ExitStack() as stack, ThreadPoolExecutor(len(KINDS)) as threads:

        def start(kind: str) -> Served:
            more = ("--batch", "3", "--wait-ms", "50") if kind == "static" else ()
            return stack.enter_context(served(*options, module=("benchmarks.server.baselines", kind, *more)))

        yield dict(zip(KINDS, threads.map(start, KINDS)))


async def test_every_baseline_answers_as_the_server_does(tiny: Server, baselines: dict[str, Served]) -> None:
    """Together, as they share batches: of greedy completions and of drawn ones, streamed."""
    bodies: list[dict[str, Any]] = [
        {"prompt": prompt, "max_tokens": length, "temperature": temperature, "seed": 7}
        for temperature in (0.0, 0.9)
        for prompt, length in zip(PROMPTS, LENGTHS)
    ]
    right = [tiny.complete(**body, return_token_ids=True)["choices"][0]["token_ids"] for body in bodies]
    for kind, server in baselines.items():
        responses = await asyncio.gather(*(server.ask(**body) for body in bodies))
        assert [response.tokens for response in responses] == right, kind
        assert [bytes(response.prompt) for response in responses[:4]] == [prompt.encode() for prompt in PROMPTS], kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_speaks_the_same_api(kind: str, tiny: Server, baselines: dict[str, Served]) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{baselines[kind].port}", timeout=300) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        said = {"messages": [{"role": "user", "content": "Speak."}], "max_tokens": 6, "temperature": 0}
        whole = client.post("/v1/chat/completions", json=said).json()
        right = tiny.http.post("/v1/chat/completions", json=said).json()
        assert whole["choices"] == right["choices"]
        assert whole["usage"]["completion_tokens"] == right["usage"]["completion_tokens"] == 6
        stream = client.post("/v1/chat/completions", json={**said, "stream": True}).content
        frames = [frame.removeprefix(b"data: ") for frame in stream.split(b"\n\n")]
        assert frames[-2:] == [b"[DONE]", b""]
        deltas = [orjson.loads(frame)["choices"][0]["delta"] for frame in frames[:-2]]
        assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_what_a_baseline_cannot_do_is_refused_by_name(kind: str, baselines: dict[str, Served]) -> None:
    url = f"http://127.0.0.1:{baselines[kind].port}/v1/completions"
    for param, body in REFUSED.items():
        refused = httpx.post(url, json={"prompt": "a", "max_tokens": 1, **body}, timeout=300)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param


async def test_one_that_left_does_not_hold_up_the_next(baselines: dict[str, Served]) -> None:
    for kind in ("one-at-a-time", "static"):
        left = await baselines[kind].send(prompt="Forever", max_tokens=1_000_000, ignore_eos=True)
        async with asyncio.timeout(300):
            while not left.pieces:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await left.leave()
            response = await baselines[kind].ask(prompt="Next", max_tokens=2)
        assert len(response.tokens) == 2
