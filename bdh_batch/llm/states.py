"""Saved states of the Python API: the same records and files that a server has, without HTTP."""

from __future__ import annotations

import os
import secrets
from array import array
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.request.client import Client
from bdh_batch.http.states import header
from bdh_batch.http.states.bodies import StateBody
from bdh_batch.http.states.header import Header
from bdh_batch.http.states.records import KIND, About, found, new_record, shown
from bdh_batch.http.states.saving import Saving, Source
from bdh_batch.http.states.transfer import PIECE, check_finite, head_of
from bdh_batch.llm.outputs import Prompt, RequestOutput, State
from bdh_batch.llm.prompts import plain
from bdh_batch.llm.requests import Requests, encoded, named
from bdh_batch.messages.state import INVALID
from bdh_batch.store.record import Record
from bdh_batch.system.threads import in_daemon_thread

THREAD = "bdh-state-files"
PAGE = 100  # records that are listed at a time
File = str | os.PathLike[str]


class States:
    """Saves, lists, copies and deletes the states of a model in this process."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._serving = requests.serving
        self._model = requests.host.served
        self._records = requests.serving.records

    async def save(self, of: Prompt | RequestOutput, metadata: Mapping[str, str] | None, ttl: float | None) -> State:
        client = self._requests.client()
        with client.cleanup, named({"prompt": "of", header.FILE: "of"}):
            body = self._parsed(state="", metadata=metadata, ttl=ttl)
            saving, tokens = self._saving(client), await self._tokens(of)
            about = About(self._model.name, len(tokens), metadata=body.metadata or {})
            return _state(await saving.stored(Source(tokens, "prompt"), about, body.ttl))

    async def fork(self, state: State | str, metadata: Mapping[str, str] | None, ttl: float | None) -> State:
        body = self._parsed(state=id_of(state), metadata=metadata, ttl=ttl)
        client = self._requests.client()
        record = await self._found(state, client)
        about = replace(About.of(record), metadata=body.metadata or {})
        new = new_record(about, array("i", record.tokens), record.owner, body.ttl, record.state)
        await self._records.put(new)
        return _state(await self._found(new.id, client))

    async def list(self) -> list[State]:
        owner, after = self._requests.client().caller.owner, None
        records: list[Record] = []
        while page := await self._records.list(KIND, owner, PAGE, after):
            records += page
            after = page[-1].id
        return [_state(record) for record in records]

    async def delete(self, state: State | str) -> None:
        record = await self._found(state, self._requests.client())
        await self._records.delete(KIND, record.id, record.owner)

    async def export(self, state: State | str, path: File) -> None:
        client = self._requests.client()
        with client.cleanup:
            record = await self._found(state, client)
            file = await self._records.state_file(record)
            if file is None:  # it made room for others
                record = await self._saving(client).restored(record)
                file = await self._records.state_file(record)
            if file is None:
                raise InvalidRequest("state: It has been deleted meanwhile.", "state", "not_found")
            client.cleanup.callback(file.close)
            known = await in_daemon_thread(partial(header.read, file.path), THREAD)
            copy = partial(_copy, file.path, Path(path), head_of(record, known), known.size)
            await in_daemon_thread(copy, THREAD)

    async def load(self, path: File, metadata: Mapping[str, str] | None, ttl: float | None) -> State:
        client = self._requests.client()
        file = await in_daemon_thread(partial(_opened, Path(path)), THREAD)
        with client.cleanup, file, named({header.FILE: "path"}):
            body = self._parsed(state="", metadata=metadata, ttl=ttl)
            known = await in_daemon_thread(partial(_header_of, file), THREAD)
            tokens, saving, new = known.tokens(), self._saving(client), self._records.new_state()
            # Nobody can tell whether it is really the state after its tokens: it is a prefix of nothing else.
            about = About(self._model.name, len(tokens), metadata=body.metadata or {}, salt=f"{new.id} ")
            await saving.check(tokens)
            try:
                await self._records.write(new, _pieces(file, known, tokens))
            except BaseException:
                self._records.discard(new.id)
                raise
            return _state(await saving.uploaded(new, tokens, known, about, body.ttl))

    async def _tokens(self, of: Prompt | RequestOutput) -> array[int]:
        """Raises InvalidRequest: there are none, or they are not the model's."""
        if isinstance(of, RequestOutput):
            tokens = array("i", [*of.prompt_token_ids, *of.latent_token_ids, *of.outputs[0].token_ids])
            await self._saving(self._requests.client()).check(tokens)
            return tokens
        body = self._parsed(prompt=plain(of, "of"))
        [prompt] = await self._model.backend.tokenized(body.prompts())
        return array("i", iter(prompt.tokens))

    def _saving(self, client: Client) -> Saving:
        return Saving(self._serving, client, self._model)

    async def _found(self, state: State | str, client: Client) -> Record:
        return await found(self._records, id_of(state), client.caller.owner, "state")

    def _parsed(self, **fields: Any) -> StateBody:
        """A body of /v1/states with these fields. Raises InvalidRequest."""
        body = self._serving.parse(b"{" + encoded(fields) + b"}", StateBody)
        most = self._serving.settings.store.ttl_seconds
        if body.ttl is not None and body.ttl > most:
            raise InvalidRequest(f"ttl is at most {most:g} seconds (store.ttl_seconds).", "ttl")
        return body


def id_of(state: object) -> str:
    """Raises InvalidRequest: it is neither a state nor the id of one."""
    if isinstance(state, State):
        return state.id
    if isinstance(state, str):
        return state
    raise InvalidRequest("state: Input should be a State, or the id of one.", "state")


def _state(record: Record) -> State:
    values = shown(record)
    del values["object"]
    return State(file_bytes=values.pop("bytes"), **values)


def _opened(path: Path) -> BinaryIO:
    return path.open("rb")


def _header_of(file: BinaryIO) -> Header:
    """Raises InvalidRequest: it is no whole state."""
    length = header.length_in(file.read(header.LENGTH))
    known = header.parsed(file.read(length))
    whole, there = header.LENGTH + length + known.size, os.fstat(file.fileno()).st_size
    if there != whole:
        text = f"The file is no whole state: it has {there} bytes, and by its header {whole}."
        raise InvalidRequest(text, header.FILE, INVALID)
    return known


async def _pieces(file: BinaryIO, known: Header, tokens: array[int]) -> AsyncIterator[bytes]:
    """The file as an engine writes it; it has been read up to its tensor. Raises InvalidRequest: a number in it is not
    finite."""
    yield known.of_engine(tokens)
    for left, dtype in known.parts:
        while left:
            piece = await in_daemon_thread(partial(_piece, file, min(left, PIECE), dtype), THREAD)
            left -= len(piece)
            yield piece


def _piece(file: BinaryIO, size: int, dtype: str) -> bytes:
    """Raises InvalidRequest: it is cut off meanwhile, or a number is not finite."""
    piece = file.read(size)
    if len(piece) < size:
        raise InvalidRequest("The file is no whole state: it ends too soon.", header.FILE, INVALID)
    check_finite(piece, dtype)
    return piece


def _copy(source: Path, target: Path, head: bytes, size: int) -> None:
    """Writes `head`, and the last `size` bytes of `source`, whole or not at all. Raises OSError."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with source.open("rb") as read, part.open("xb") as write:
            read.seek(-size, os.SEEK_END)
            write.write(head)
            while piece := read.read(PIECE):
                write.write(piece)
            write.flush()
            os.fsync(write.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
