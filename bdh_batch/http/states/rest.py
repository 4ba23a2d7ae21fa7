"""The handlers of /v1/states (`http/endpoints.py`)."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson
from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bdh_batch.backends.base import TextBackend
from bdh_batch.errors import InvalidRequest, UnsupportedParameter
from bdh_batch.http.errors import NotFound
from bdh_batch.http.request.body import check_query
from bdh_batch.http.request.client import Client
from bdh_batch.http.serving import Serving
from bdh_batch.http.states import header
from bdh_batch.http.states.bodies import Metadata, StateBody
from bdh_batch.http.states.records import KIND, About, found, new_record, opened_file, shown
from bdh_batch.http.states.saving import Saving, Source
from bdh_batch.http.states.transfer import Upload, Uploads, download, head_of
from bdh_batch.messages.state import INVALID, SavedState
from bdh_batch.store.record import Record, RecordDamaged, reading

MOST_LISTED, LISTED = 100, 20
RESPONSE = "response"
METADATA: TypeAdapter[dict[str, str]] = TypeAdapter(Metadata)


class States:
    """Handles the requests to /v1/states."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._records = serving.records
        self._uploads = Uploads()

    async def create(self, request: Request) -> Response:
        check_query(request, self._serving.settings)
        serving, client, raw = self._serving, Client.of(request), await request.body()
        body = await serving.aside(client).run(len(raw), serving.parse, raw, StateBody)
        ttl, metadata = self._ttl(body.ttl), body.metadata or {}
        if body.prompt is not None:
            made = await self._of_prompt(client, body, metadata, ttl)
        elif body.response is not None:
            made = await self._of_response(client, body.response, metadata, ttl)
        elif body.request is not None:
            made = await self._of_request(client, body.request, metadata, ttl)
        else:
            made = await self._fork(client, body.state or "", metadata, ttl)
        return JSONResponse(shown(made))

    async def list(self, request: Request) -> Response:
        check_query(request, self._serving.settings, "after", "limit")
        owner, limit = request.state.caller.owner, _limit(request)
        after = request.query_params.get("after")
        if after is not None:
            await found(self._records, after, owner, "after")
        page: list[dict[str, Any]] = []
        more = True
        while more and (wanted := limit - len(page)):
            listed = await self._records.list(KIND, owner, wanted + 1, after)
            more = len(listed) > wanted
            for each in listed[:wanted]:
                after = each.id
                try:
                    page.append(shown(each))
                except RecordDamaged as error:
                    self._records.left_out(after, error.message)
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return JSONResponse({"object": "list", "data": page, **ends, "has_more": more})

    async def show(self, request: Request) -> Response:
        check_query(request, self._serving.settings)
        return JSONResponse(shown(await self._named(request)))

    async def delete(self, request: Request) -> Response:
        check_query(request, self._serving.settings)
        record = await self._named(request)
        await self._records.delete(KIND, record.id, record.owner)
        return JSONResponse({"id": record.id, "object": KIND, "deleted": True})

    async def download(self, request: Request) -> Response:
        check_query(request, self._serving.settings)
        client, record = Client.of(request), await self._named(request)
        opened = await opened_file(self._records, record)
        if opened is None:
            record = await (await self._saving(client, About.of(record).model)).restored(record)
            opened = await opened_file(self._records, record)
        if opened is None:
            raise NotFound(f"State with id {record.id!r} not found.", None, "not_found")
        file, known = opened
        client.cleanup.callback(file.close)
        head = await self._serving.aside(client).run(len(record.tokens), head_of, record, known)
        return download(file.path, record.id, head, known.size)

    async def upload(self, request: Request) -> Response:
        check_query(request, self._serving.settings, "model", "ttl")
        client, given = Client.of(request), request.query_params
        ttl = self._ttl(_seconds(given.get("ttl")))
        # Whoever looked for its leaving before its body is read would take parts of that.
        leaves, client.leaves = client.leaves, None
        with self._uploads.one(client.caller.owner):
            coming = Upload(request, self._serving.settings.store.max_state_bytes)
            text = await coming.header()
            aside = self._serving.aside(client)
            known = await aside.run(len(text), header.parsed, text)
            coming.check(known, text)
            saving = await self._saving(client, given.get("model", known.metadata.get("model")))
            known.check(saving.model.layout, header.FILE)
            tokens = await aside.run(len(text), known.tokens)
            metadata = _metadata(known.metadata.get("metadata"))
            new = self._records.new_state()
            about = About(saving.model.name, len(tokens), metadata=metadata, salt=f"{new.id} ")
            await saving.check(tokens)

            async def pieces() -> Any:
                yield known.of_engine(tokens)
                async for piece in coming.tensors():
                    yield piece

            try:
                await self._records.write(new, pieces())
                client.leaves = leaves
            except BaseException:
                self._records.discard(new.id)
                raise
            made = await saving.uploaded(new, tokens, known, about, ttl)
        return JSONResponse(shown(made))

    async def _of_prompt(
        self, client: Client, body: StateBody, metadata: Mapping[str, str], ttl: float | None
    ) -> Record:
        saving = await self._saving(client, body.model)
        [prompt] = await saving.model.backend.tokenized(body.prompts())
        tokens = await self._serving.aside(client).run(len(prompt.tokens), array, "i", iter(prompt.tokens))
        about = About(saving.model.name, len(tokens), metadata=metadata)
        return await saving.stored(Source(tokens, "prompt"), about, ttl)

    async def _of_response(self, client: Client, id: str, metadata: Mapping[str, str], ttl: float | None) -> Record:
        owner = client.caller.owner
        record = await self._records.get(RESPONSE, id, owner) if id.startswith("resp_") else None
        if record is None:
            raise NotFound(f"Response with id {id[:128]!r} not found.", RESPONSE, "not_found")
        if not record.tokens:
            raise InvalidRequest(
                "The response's tokens are not known: it has not ended well, or is an upstream's.", RESPONSE
            )
        model, salt = await self._serving.aside(client).run(len(record.body), _model_and_salt, record)
        saving = await self._saving(client, model)
        tokens = array("i", record.tokens)
        about = About(saving.model.name, len(tokens), metadata=metadata, salt=salt)
        opened = await opened_file(self._records, record)
        if opened is None:
            return await saving.stored(Source(tokens, RESPONSE, salt=salt), about, ttl)
        file, known = opened
        client.cleanup.callback(file.close)
        if known.read == len(tokens):  # the file is that of both
            about = about.with_file(known)
            return await self._put(new_record(about, tokens, owner, ttl, record.state))
        begin = SavedState(str(file.path), known.read)
        return await saving.stored(Source(tokens, RESPONSE, begin, salt), about, ttl)

    async def _of_request(self, client: Client, id: str, metadata: Mapping[str, str], ttl: float | None) -> Record:
        completion = await self._serving.recent.find(client.caller.owner, id)
        if completion is None:
            text = f"Request with id {id[:128]!r} not found: no completion of that x-request-id ended well a while ago."
            raise NotFound(text, "request", "not_found")
        saving = await self._saving(client, completion.model)
        tokens = await self._serving.aside(client).run(completion.size, completion.tokens)
        about = About(saving.model.name, len(tokens), metadata=metadata, salt=completion.salt)
        return await saving.stored(Source(tokens, "request", salt=completion.salt), about, ttl)

    async def _fork(self, client: Client, id: str, metadata: Mapping[str, str], ttl: float | None) -> Record:
        record = await found(self._records, id, client.caller.owner, KIND)
        about = replace(About.of(record), metadata=metadata)
        return await self._put(new_record(about, array("i", record.tokens), record.owner, ttl, record.state))

    async def _put(self, record: Record) -> Record:
        await self._records.put(record)
        return await self._records.get(record.kind, record.id, record.owner) or record

    async def _saving(self, client: Client, model: str | None) -> Saving:
        served = await self._serving.model(client, model)
        if isinstance(served.backend, TextBackend):
            raise UnsupportedParameter("This model is an upstream's, which has no states here.", "model")
        return Saving(self._serving, client, served)

    async def _named(self, request: Request) -> Record:
        return await found(self._records, request.path_params["id"], request.state.caller.owner)

    def _ttl(self, given: float | None) -> float | None:
        most = self._serving.settings.store.ttl_seconds
        if given is not None and given > most:
            raise InvalidRequest(f"ttl is at most {most:g} seconds (store.ttl_seconds).", "ttl")
        return given


def _model_and_salt(record: Record) -> tuple[str, str]:
    """Those of a stored response. Raises RecordDamaged."""
    with reading(record):
        body = orjson.loads(record.body)
        return body["response"]["model"], body["salt"]


def _limit(request: Request) -> int:
    given = request.query_params.get("limit", str(LISTED))
    if not (given.isascii() and given.isdecimal() and len(given) < 10 and 1 <= int(given) <= MOST_LISTED):
        raise InvalidRequest(f"limit should be an integer from 1 to {MOST_LISTED}.", "limit")
    return int(given)


def _seconds(given: str | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidRequest("ttl should be seconds, more than 0.", "ttl")
    return seconds


def _metadata(given: str | None) -> dict[str, str]:
    """Those that a file has from its download. Raises InvalidRequest."""
    try:
        return {} if given is None else METADATA.validate_json(given)
    except ValidationError as error:
        text = "The file's metadata should be at most 16 texts of 512 characters, by names of 64."
        raise InvalidRequest(text, header.FILE, INVALID) from error
