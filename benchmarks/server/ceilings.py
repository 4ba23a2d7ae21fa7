"""Two apps with no engine behind them, on the same uvicorn and uvloop: what an event costs at least, and what it costs
as it is often made.

    python -m benchmarks.server.ceilings --port 8001

A request's body says for how many `max_tokens` it is. Each is an event and a write; a crowd's streams begin together,
and take turns. `/bare` writes the same bytes every time; `/pydantic` makes a chunk of typed objects for each token,
and dumps it.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence

import orjson
import uvicorn
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from bdh_batch.http.docs.response_types import CompletionChunk, CompletionChunkChoice
from bdh_batch.http.responses.frames import DONE
from bdh_batch.http.responses.generation import HEADERS


def chunk(text: str) -> CompletionChunk:
    choice = CompletionChunkChoice(index=0, text=text, logprobs=None, finish_reason=None)
    return CompletionChunk(
        id="cmpl-0123456789abcdef0123456789abcdef",
        object="text_completion",
        created=1763700000,
        model="bdh-shakespeare",
        system_fingerprint="bdh-shakespeare-bdh_batch-0.1.0",
        choices=[choice],
    )


def event(text: str) -> bytes:
    return b"data: " + chunk(text).model_dump_json(exclude_unset=True).encode() + b"\n\n"


SAME = event("a")


async def bare(tokens: int, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    for _ in range(tokens):
        await send({"type": "http.response.body", "body": SAME, "more_body": True})
        await asyncio.sleep(0)  # to the other streams
    await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def modelled(tokens: int) -> AsyncIterator[bytes]:
    for number in range(tokens):
        yield event(chr(ord("a") + number % 26))
        await asyncio.sleep(0)
    yield DONE


def app_for(crowd: int) -> ASGIApp:
    """The app; streams begin when there are `crowd` of them."""
    start = asyncio.Barrier(crowd)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        if not body:
            await Response()(scope, receive, send)  # it is ready
            return
        tokens = orjson.loads(body)["max_tokens"]
        await start.wait()
        if scope["path"] == "/bare":
            await bare(tokens, send)
        else:
            await StreamingResponse(modelled(tokens), media_type="text/event-stream")(scope, receive, send)

    return app


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--crowd", type=int, default=256, help="streams at the same time")
    chosen = parser.parse_args(arguments)
    app = app_for(chosen.crowd)
    uvicorn.run(app, port=chosen.port, loop="uvloop", lifespan="off", access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
