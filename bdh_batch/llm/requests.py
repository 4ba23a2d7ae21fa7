"""Requests of the Python API: the same bodies as over HTTP, checked, prepared and started by the same code."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from uuid import uuid4

import orjson
from starlette.requests import ClientDisconnect

from bdh_batch.backends.base import Backend, Generation
from bdh_batch.errors import InvalidRequest, Unavailable
from bdh_batch.http.auth.caller import at_address
from bdh_batch.http.request.client import Client
from bdh_batch.http.responses.generation import collect, failure_of
from bdh_batch.http.schema.requests import ChatBody, CompletionBody
from bdh_batch.http.schema.text import EmbeddingBody
from bdh_batch.http.states.records import Beginning
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Prompt, Text
from bdh_batch.processes.in_process import InProcess

log = logging.getLogger(__name__)

Body = TypeVar("Body", CompletionBody, ChatBody, EmbeddingBody)
OPTIONS = orjson.OPT_SERIALIZE_NUMPY
RETRY_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Ask(Generic[Body]):
    """One request.

    Args:
        raw: its body, in JSON.
        names: what the caller calls some of the body's fields; `""` is what comes before the names of all others.
        prompt: as it was given, where it was a text.
    """

    kind: type[Body]
    raw: bytes
    names: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    sequences: int = 1


@dataclass(slots=True)
class Rendered:
    """Remembers the text that a template made of a conversation."""

    text: str | None = None

    async def tokenized(self, backend: Backend, text: Text, last: int | None) -> list[Prompt]:
        spelt = text.text
        for stand_in, token in (text.stand_ins or {}).items():
            spelt = spelt.replace(stand_in, token)
        self.text = spelt
        return await backend.tokenized([("messages", text)], last)

    def begin(self, begun: Beginning, tokens: Sequence[int]) -> None:
        """What comes before the text is no text of the conversation."""


@dataclass(frozen=True, slots=True)
class Started:
    """A request under way."""

    id: str
    prompt: str | None
    request: GenerationRequest
    generation: Generation
    client: Client


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that has ended, and all that each of its sequences gained."""

    started: Started
    ends: list[Delta]


def encoded(values: Mapping[str, Any]) -> bytes:
    """The members of a JSON object. Raises InvalidRequest, naming the field that JSON has no way to say."""
    members = []
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"{name}: Input should be a finite number.", name)
        try:
            members.append(b'"%b":%b' % (name.encode(), orjson.dumps(value, option=OPTIONS)))
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{name}: {error}.", name) from error
    return b",".join(members)


@contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Has errors about a body's fields call them as the caller does."""
    try:
        yield
    except InvalidRequest as error:
        _rename(error, names)
        raise


def _rename(error: InvalidRequest, names: Mapping[str, str]) -> None:
    if (param := error.param) is None:
        return
    root = param if param in names else param.split(".")[0].split("[")[0]
    new = names[root] + param[len(root) :] if root in names else names.get("", "") + param
    if error.message.startswith(param):
        error.args = (new + error.message[len(param) :], *error.args[1:])
    error.param = new


class Requests:
    """Makes requests to a model in this process."""

    def __init__(self, host: InProcess) -> None:
        self.host = host
        self.serving = host.serving

    def client(self) -> Client:
        """Who asks: this machine."""
        return Client(uuid4().hex, at_address(""), {})

    async def whole(self, ask: Ask[Any]) -> Ended:
        """All of a request's response. Raises BDHError."""
        client = self.client()
        try:
            with named(ask.names):
                started = await self._start(client, ask)
                return Ended(started, await collect(started.generation, client))
        except ClientDisconnect:
            raise closed() from None
        finally:
            client.cleanup.close()

    async def stream(self, ask: Ask[Any]) -> Stream:
        """A request's response as it comes. It has to be closed. Raises BDHError."""
        client = self.client()
        try:
            with named(ask.names):
                return Stream(await self._start(client, ask))
        except BaseException:
            client.cleanup.close()
            raise

    async def _start(self, client: Client, ask: Ask[Any]) -> Started:
        serving, size = self.serving, len(ask.raw)
        model = await serving.model(client, None)
        body = await serving.aside(client).run(size, serving.parse, ask.raw, ask.kind)
        preparation, rendered = serving.preparation(client, model, size), Rendered()
        if isinstance(body, EmbeddingBody):
            prepared, generating = await preparation.embedding(body), None
        else:
            is_chat = isinstance(body, ChatBody)
            prepared, generating = await preparation.generation(body, rendered if is_chat else None), body
        if prepared.grammar is not None:
            for warning in prepared.grammar.warnings:
                log.warning("structured output: %s", warning)
        generation = await serving.start(client, model, prepared, generating, size)
        return Started(client.id, ask.prompt or rendered.text, prepared, generation, client)


class Stream:
    """The deltas of one request, until all its sequences have ended."""

    def __init__(self, started: Started) -> None:
        self.started = started
        self._deltas = aiter(started.generation)
        self._closed = False

    def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        return self

    async def __anext__(self) -> list[tuple[int, Delta]]:
        """Raises BDHError: the one that a sequence ended with."""
        if self._closed:
            raise StopAsyncIteration
        try:
            deltas = await anext(self._deltas)
            if (failed := failure_of(deltas)) is not None:
                raise failed
            if any(delta.finish_reason is FinishReason.ABORT for _, delta in deltas):
                raise closed()
        except BaseException:
            self.close()
            raise
        return deltas

    def close(self) -> None:
        """Ends what still runs. Idempotent."""
        if not self._closed:
            self._closed = True
            self.started.generation.abort()
            self.started.client.cleanup.close()


def closed() -> Unavailable:
    return Unavailable("The model has been closed.", RETRY_SECONDS)
