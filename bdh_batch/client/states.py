"""The states of `client.states`, sync and async: saved, forked, and carried from one server to another as files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from openai import APIResponse, AsyncAPIResponse, AsyncOpenAI, BaseModel, OpenAI, RequestOptions

from bdh_batch.client.calls import Call, itself, nothing
from bdh_batch.client.errors import InvalidRequest, meaning, reading
from bdh_batch.client.methods import AsyncSender, Result, Sender, awaited, now

PATH = "/v1/states"
ID = re.compile(r"\w+", re.ASCII)
PIECE = 2**20  # bytes that are read or written at a time
FILE = {"content-type": "application/octet-stream"}
STREAMED = {"x-stainless-raw-response": "stream", "accept": "*/*"}  # has the official client leave a response unread


class State(BaseModel):
    """A saved state. Requests begin in it with `state=state.id`.

    `created_at` and `expires_at` are in Unix seconds; `tokens` is how many it has read, `bytes` the size of its file,
    which is 0 where that made room for others: the server computes it again.
    """

    id: str
    created_at: int
    expires_at: int
    model: str
    fingerprint: str
    dtype: str
    tokens: int
    bytes: int
    metadata: dict[str, str]


class Page(BaseModel):
    """A page of states."""

    data: list[State]


def save(
    prompt: str | Sequence[int] | None = None,
    *,
    response: str | None = None,
    request: str | None = None,
    model: str | None = None,
    add_special_tokens: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    ttl: float | None = None,
) -> Call[State]:
    """Saves the state after a prompt, a stored response, or a completion a short while ago.

    Args:
        prompt: a text or token ids, which `model` reads.
        response: the id of a response.
        request: the `x-request-id` of a completion or a chat: the state after its first choice.
        metadata: up to 16 texts by name.
        ttl: seconds that it is kept; None is as long as the server keeps any.
    """
    body: dict[str, object] = {"prompt": prompt, "response": response, "request": request, "model": model}
    body |= {"add_special_tokens": add_special_tokens, "metadata": metadata, "ttl": ttl}
    return Call(PATH, State, itself(State), body)


def load(id: str) -> Call[State]:
    """The state of that id."""
    return Call(_path(id), State, itself(State))


def fork(id: str, *, metadata: Mapping[str, str] | None = None, ttl: float | None = None) -> Call[State]:
    """A new state that is the same, with metadata and a time of its own; both share a file."""
    return Call(PATH, State, itself(State), {"state": id, "metadata": metadata, "ttl": ttl})


def list_states(*, limit: int = 20, after: str | None = None) -> Call[list[State]]:
    """A page of one's states, the newest first: those older than the one of the id `after`."""
    query = {"limit": str(limit)} | ({} if after is None else {"after": after})
    return Call(PATH, Page, lambda page: list(itself(Page)(page).data), options={"params": query})


def delete(id: str) -> Call[None]:
    """Deletes a state. Requests that have begun in it go on."""
    return Call(_path(id), object, nothing, method="delete")


class States:
    """Speaks to a server about its states. Every method raises the errors of `bdh_batch.client.errors`."""

    def __init__(self, sender: Sender, openai: OpenAI, root: str) -> None:
        self._sender = sender
        self._openai = openai
        self._root = root

    save = now(save)
    load = now(load)
    fork = now(fork)
    list = now(list_states)
    delete = now(delete)

    def send(self, call: Call[Result]) -> Result:
        return self._sender.send(call)

    def download(self, id: str, path: str | os.PathLike[str]) -> None:
        """Writes a state to a safetensors file, whole or not at all. Raises OSError, too."""
        url, options = f"{self._root}{_path(id)}/content", _options(STREAMED)
        with _written(Path(path)) as file:
            with meaning():
                response: Any = self._openai.get(url, cast_to=APIResponse[bytes], options=options)
            with reading(), contextlib.closing(response):
                for piece in response.iter_bytes(PIECE):
                    file.write(piece)

    def upload(self, path: str | os.PathLike[str], *, model: str | None = None, ttl: float | None = None) -> State:
        """Stores the state in a file that was downloaded, of this server or of another one of the same model.

        Args:
            model: its name here, if it is another one than the file says.
            ttl: seconds that it is kept; None is as long as the server keeps any.

        Raises:
            OSError, too.
        """
        url, options = f"{self._root}{PATH}/content", _options(FILE, _query(model, ttl))
        with Path(path).open("rb") as file, meaning():
            return self._openai.post(url, cast_to=State, content=file, options=options)


class AsyncStates:
    """As States, with asyncio."""

    def __init__(self, sender: AsyncSender, openai: AsyncOpenAI, root: str) -> None:
        self._sender = sender
        self._openai = openai
        self._root = root

    save = awaited(save)
    load = awaited(load)
    fork = awaited(fork)
    list = awaited(list_states)
    delete = awaited(delete)

    def send(self, call: Call[Result]) -> Awaitable[Result]:
        return self._sender.send(call)

    async def download(self, id: str, path: str | os.PathLike[str]) -> None:
        """Writes a state to a safetensors file, whole or not at all. Raises OSError, too."""
        url, options = f"{self._root}{_path(id)}/content", _options(STREAMED)
        with _written(Path(path)) as file:
            with meaning():
                response: Any = await self._openai.get(url, cast_to=AsyncAPIResponse[bytes], options=options)
            async with contextlib.AsyncExitStack() as stack:
                stack.enter_context(reading())
                stack.push_async_callback(response.close)
                async for piece in response.iter_bytes(PIECE):
                    await asyncio.to_thread(file.write, piece)

    async def upload(
        self, path: str | os.PathLike[str], *, model: str | None = None, ttl: float | None = None
    ) -> State:
        """Stores the state in a file that was downloaded, of this server or of another one of the same model.

        Args:
            model: its name here, if it is another one than the file says.
            ttl: seconds that it is kept; None is as long as the server keeps any.

        Raises:
            OSError, too.
        """
        with await asyncio.to_thread(Path(path).open, "rb") as file, meaning():
            length = {"content-length": str(os.fstat(file.fileno()).st_size)}
            url, options = f"{self._root}{PATH}/content", _options(FILE | length, _query(model, ttl))
            return await self._openai.post(url, cast_to=State, content=_pieces(file), options=options)


def _path(id: str) -> str:
    """The path of that state, and of nothing else. Raises InvalidRequest: no state has such an id."""
    if ID.fullmatch(id) is None:
        raise InvalidRequest(f"id: {id!r:.200} is not the id of a state.", param="id")
    return f"{PATH}/{id}"


def _options(headers: Mapping[str, str], query: Mapping[str, object] | None = None) -> RequestOptions:
    """Nothing is sent twice: a file would be at its end."""
    return {"headers": {**headers}, "params": query or {}, "max_retries": 0}


def _query(model: str | None, ttl: float | None) -> dict[str, object]:
    return {name: value for name, value in (("model", model), ("ttl", ttl)) if value is not None}


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    while piece := await asyncio.to_thread(file.read, PIECE):
        yield piece


@contextlib.contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name once it is whole."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
