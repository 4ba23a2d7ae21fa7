"""The HTTP client of all benchmarks: on the connections of `bdh_batch.bench`, which note the moment of each read.

What is streamed is kept as it came and parsed after the measurement, so that a client costs little. Two do not use it:
locust's users have locust's (`stress/locustfile.py`), and what is not a request as libraries send it goes over
`raw.py`.
"""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from prometheus_client.parser import text_string_to_metric_families

from bdh_batch.bench.connection import Address, Connection, Pool
from bdh_batch.bench.outcome import Failed
from bdh_batch.bench.sse import Events

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CLOSE = {"connection": "close"}
GET_SECONDS = 10.0


@dataclass
class Choice:
    """What a choice has: of its log-probabilities, those of the tokens themselves."""

    text: str = ""
    finish_reason: str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)

    def take(self, event: Mapping[str, Any]) -> None:
        """Adds what the part of an event says that is about this choice."""
        self.text += event.get("text") or event.get("delta", {}).get("content") or ""
        self.finish_reason = event.get("finish_reason") or self.finish_reason
        logprobs = event.get("logprobs") or {}
        self.tokens += logprobs.get("tokens") or [each["token"] for each in logprobs.get("content") or ()]
        self.logprobs += logprobs.get("token_logprobs") or [each["logprob"] for each in logprobs.get("content") or ()]


@dataclass
class Response:
    """What a stream brought: the moment at which each token was read, in seconds of `time.perf_counter`."""

    sent: float
    status: int = 0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, int] = field(default_factory=dict)  # tokens: of the prompts, of the completions, and both
    cached_tokens: int = 0
    complete: bool = False

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.sent

    def take(self, data: bytes, now: float) -> None:
        """Adds what an event says."""
        if data == b"[DONE]":
            self.complete = True
            return
        event = orjson.loads(data)
        self.prompt += event.get("prompt_token_ids") or []  # of a chat; of completions, they are in the choices
        for choice in event.get("choices", ()):
            self.choices.setdefault(choice["index"], Choice()).take(choice)
            self.prompt += choice.get("prompt_token_ids") or []
            tokens = choice.get("token_ids") or []
            self.tokens += tokens
            self.times += [now] * len(tokens)
        if usage := event.get("usage"):
            self.usage = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
            self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]


class Recording:
    """Keeps a response as it comes; implements `bench.connection.ResponseReader`."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.failure: Failed | None = None
        self.status = 0
        self.pieces: list[tuple[float, bytes]] = []

    def begin(self, status: int, content_type: str) -> None:
        self.status = status

    def take(self, body: bytes, now: float) -> None:
        self.pieces.append((now, body))

    @property
    def body(self) -> bytes:
        return b"".join(body for _, body in self.pieces)


class Stream:
    """One request whose response streams, on a connection of its own."""

    def __init__(self, connection: Connection, request: bytes) -> None:
        self._connection = connection
        self._recording = Recording()
        self._end = connection.send(request, self._recording)

    @property
    def pieces(self) -> int:
        return len(self._recording.pieces)

    async def end(self) -> Response:
        """Waits for the response, which must be whole.

        Raises:
            RuntimeError: it is not, or it is a refusal.
        """
        recording = self._recording
        try:
            await self._end
        except Failed as failed:
            raise RuntimeError(f"status {recording.status}: {failed}: {recording.body[-500:]!r}") from failed
        finally:
            self._connection.close()
        response = self.response() if recording.status == 200 else Response(recording.sent)
        if not response.complete:
            raise RuntimeError(f"status {recording.status}: {recording.body[-500:]!r}")
        return response

    async def leave(self) -> Response:
        """Closes, as a client that has had enough."""
        self._connection.close()
        await asyncio.sleep(0)  # in which it is closed
        return self.response()

    def response(self) -> Response:
        """What has come so far."""
        found, events = Response(self._recording.sent, self._recording.status), Events()
        for now, body in self._recording.pieces:
            for _, data in events.feed(body):
                found.take(data, now)
        return found


class Client:
    """Speaks to one server, from one event loop at a time.

    Args:
        keep: whether connections of whole responses are kept and used again.
    """

    def __init__(self, url: str, keep: bool = True) -> None:
        self.url = url
        self.address = Address.of(url, insecure=False)
        self._headers = {} if keep else CLOSE
        self._pool = Pool(self.address)

    async def send(self, path: str = COMPLETIONS, key: str = "", **body: Any) -> Stream:
        """Sends a request whose response streams, token by token."""
        whole = {**body, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        request = self._request("POST", path, {**CLOSE, "authorization": f"Bearer {key}"}, whole)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.address.host, self.address.port)
        return Stream(connection, request)

    async def ask(self, path: str = COMPLETIONS, key: str = "", **body: Any) -> Response:
        return await (await self.send(path, key, **body)).end()

    async def events(self, path: str, **body: Any) -> tuple[float, list[tuple[float, dict[str, Any]]]]:
        """When a request whose response streams was sent, and its events, each with when it was read.

        Raises:
            Failed: it did not end well.
            RuntimeError: it is a refusal.
        """
        recording, events = Recording(), Events()
        await self._pool.exchange(self._request("POST", path, self._headers, {**body, "stream": True}), recording)
        if recording.status != 200:
            raise RuntimeError(f"status {recording.status}: {recording.body[-500:]!r}")
        found = [(now, data) for now, piece in recording.pieces for _, data in events.feed(piece)]
        return recording.sent, [(now, orjson.loads(data)) for now, data in found if data != b"[DONE]"]

    async def whole(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        """The status and the body of a response in one piece.

        Raises:
            Failed: there was none.
        """
        recording = Recording()
        await self._pool.exchange(self._request(method, path, self._headers, body), recording)
        return recording.status, recording.body

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of a response.

        Raises:
            Failed: there was none.
            RuntimeError: it is a refusal.
        """
        status, content = await self.whole("POST", path, body)
        if status != 200:
            raise RuntimeError(f"status {status}: {content[-500:]!r}")
        return orjson.loads(content)

    async def metrics(self) -> dict[str, float]:
        """The value of each metric; of one with labels, that of its last ones."""
        _, content = await self.whole("GET", "/metrics")
        families = text_string_to_metric_families(content.decode())
        return {sample.name: sample.value for family in families for sample in family.samples}

    def get(self, path: str) -> str:
        """Blocks: not for while something is measured."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=GET_SECONDS) as response:
            text: str = response.read().decode()
        return text

    def metric(self, name: str) -> float:
        """The sum over a metric's labels. Blocks."""
        families = text_string_to_metric_families(self.get("/metrics"))
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    def close(self) -> None:
        """Closes the connections that were kept."""
        self._pool.close()

    def _request(self, method: str, path: str, headers: dict[str, str], body: Mapping[str, Any] | None) -> bytes:
        content = b"" if body is None else orjson.dumps(body)
        return self.address.request(method, path, {"content-type": "application/json", **headers}, content)
