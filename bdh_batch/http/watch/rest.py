"""The handlers of what operators watch."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.auth.caller import bearer
from bdh_batch.http.request.body import check_query
from bdh_batch.http.request.client import Client, left, unless_left
from bdh_batch.http.responses.generation import HEADERS
from bdh_batch.http.serving import Serving
from bdh_batch.http.watch.feed import Feed, encoded_history

MOST_STEPS, STEPS = 200, 32  # that one request gets at most, and where it does not say
MOST_SECONDS, STEP_SECONDS = 10.0, 0.2  # that it waits for them


class Watch:
    """Handles the requests of those who watch the server."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def history(self, request: Request) -> Response:
        check_query(request, self._serving.settings)
        return Response(encoded_history(self._serving.feed), media_type="application/json")

    async def stream(self, request: Request) -> Response:
        check_query(request, self._serving.settings, "since")
        since = _number(request, "since", 0.0, math.inf)
        given, address = bearer(request.scope), request.state.caller
        await request.body()

        def is_operator() -> bool | None:
            """Whether its caller is one; None once the key is revoked."""
            caller = self._serving.admission.caller(given, address)
            return None if caller is None else caller.is_operator

        return WatchStream(self._serving.feed, address.label, since, is_operator)

    async def steps(self, request: Request) -> Response:
        check_query(request, self._serving.settings, "model", "steps", "seconds")
        client, given = Client.of(request), request.query_params
        client.caller.check_operator()
        count = _number(request, "steps", STEPS, MOST_STEPS, least=1)
        if count != int(count):
            raise InvalidRequest(f"steps should be an integer from 1 to {MOST_STEPS}.", "steps")
        seconds = _number(request, "seconds", STEP_SECONDS, MOST_SECONDS)
        model = self._serving.gate.find(client.caller, given.get("model"))
        await request.body()
        watched = self._serving.metrics.watched
        recorded = await unless_left(client, watched.all_steps(model.info.name, int(count), seconds))
        engines = [{"process": name, "steps": steps} for name, steps in recorded.items()]
        return Response(orjson.dumps({"model": model.info.name, "engines": engines}), media_type="application/json")


class WatchStream(Response):
    """An ASGI response that sends samples as they come, until its client leaves, its key is revoked, or the server
    drains.

    Args:
        since: the time after which samples are sent first, in Unix seconds.
        is_operator: whether the client is an operator, at the moment; None where it may not watch any more.
    """

    def __init__(self, feed: Feed, caller: str, since: float, is_operator: Callable[[], bool | None]) -> None:
        super().__init__()
        self._feed, self._caller, self._since = feed, caller, since
        self._is_operator = is_operator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._feed.watch(self._caller, self._since, bool(self._is_operator())) as watcher:
            leaving = asyncio.create_task(left(receive))
            leaving.add_done_callback(lambda _: watcher.close())
            try:
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                while not watcher.closed and (is_operator := self._is_operator()) is not None:
                    watcher.is_operator = is_operator
                    await send({"type": "http.response.body", "body": await watcher.take(), "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                leaving.cancel()


def _number(request: Request, name: str, default: float, most: float, least: float = 0.0) -> float:
    """Raises InvalidRequest."""
    given = request.query_params.get(name)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and least <= value <= most):
        bounds = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of {least:g} or more"
        raise InvalidRequest(f"{name} should be a number {bounds}.", name)
    return value
