"""Has an engine compute a state and write it, for a record that then has its file."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from bdh_batch.errors import InvalidRequest, NotFinite, Unavailable
from bdh_batch.http.errors import NotFound
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.request.client import Client
from bdh_batch.http.responses.generation import collect
from bdh_batch.http.serving import Serving
from bdh_batch.http.states import header
from bdh_batch.http.states.header import Header
from bdh_batch.http.states.records import About, new_record
from bdh_batch.messages import GenerationRequest, Prompt, SamplingParams, latent_positions
from bdh_batch.messages.state import INVALID, SavedState
from bdh_batch.store.record import Record
from bdh_batch.store.records import NewState

RETRY_SECONDS = 1
LATE_SECONDS = 60.0  # after which a file that nobody waits for has come, if it does


@dataclass(frozen=True, slots=True)
class Source:
    """What a state is made of.

    Args:
        tokens: that it is to have read.
        param: the field that they come from.
        begin: a state that has read the first of them.
    """

    tokens: array[int]
    param: str
    begin: SavedState | None = None
    salt: str = ""


@dataclass(frozen=True, slots=True)
class Saving:
    """Saves states of one model, which is no upstream's, for one client."""

    serving: Serving
    client: Client
    model: ServedModel

    async def stored(self, source: Source, about: About, ttl: float | None) -> Record:
        """Computes a state, and stores it under a new id.

        Raises:
            InvalidRequest: the model does not take so many tokens.
            StoreFull, StoreFailed
            Unavailable: the engine could not write it now.
            and as `Serving.start` and `collect` do.
        """
        new, found = await self._written(source)
        return await self._adopted(new, self._record(about.with_file(found), source, ttl))

    async def restored(self, record: Record) -> Record:
        """Computes the state of a record whose file is gone. Raises as `stored` does; NotFound: the record is, too;
        InvalidRequest: it is of other weights."""
        about = About.of(record)
        about.check(self.model.layout)
        new, found = await self._written(Source(array("i", record.tokens), "state", salt=about.salt))
        return await self._adopted(new, replace(record, body=about.with_file(found).body()), is_new=False)

    async def uploaded(
        self, new: NewState, tokens: array[int], found: Header, about: About, ttl: float | None
    ) -> Record:
        """Stores a file that a client sent, once the engine has begun in it: it knows what its states are.

        Raises as `stored` does.
        """
        begin = SavedState(str(new.path), len(tokens))
        source = Source(tokens, header.FILE, begin, about.salt)
        try:
            tried = self._request(source, [*tokens, tokens[-1]], optional=False)
            with _named_file():
                await collect(await self.serving.start(self.client, self.model, tried), self.client)
        except BaseException:
            self.serving.records.discard(new.id)
            raise
        return await self._adopted(new, self._record(about.with_file(found), source, ttl))

    async def check(self, tokens: array[int]) -> None:
        """Raises InvalidRequest: the model has no such tokens, or no latent steps."""
        if latent_positions(tokens):
            if self.model.defaults.latent is None:
                text = "The state cannot be used: it has latent steps, and this model has none."
                raise InvalidRequest(text, header.FILE, INVALID)
            tokens = array("i", [token for token in tokens if token >= 0])
        with _named_file():
            await self.model.backend.tokenized([(header.FILE, tokens)])

    async def _adopted(self, new: NewState, record: Record, is_new: bool = True) -> Record:
        """The record, stored with its file; a new one with it, or not at all. Raises NotFound: it has been deleted."""
        records = self.serving.records
        try:
            if is_new:
                await records.put(record)
            elif not await records.update(record):
                raise NotFound(f"State with id {record.id!r} not found.", None, "not_found")
        except BaseException:
            records.discard(new.id)
            raise
        try:
            await records.adopt(new.id, record)
        except BaseException:
            if is_new:
                await records.delete(record.kind, record.id, record.owner)
            raise
        return await records.get(record.kind, record.id, record.owner) or record

    def _record(self, about: About, source: Source, ttl: float | None) -> Record:
        return new_record(about, source.tokens, self.client.caller.owner, ttl)

    async def _written(self, source: Source) -> tuple[NewState, Header]:
        """A file with the state after the tokens."""
        records = self.serving.records
        new = records.new_state()
        try:
            request = replace(self._request(source, source.tokens), save_to=str(new.path))
            [end] = await collect(await self.serving.start(self.client, self.model, request), self.client)
            if end.saved is None:
                reason = (end.save_error or "its engine says nothing of it").rstrip(".")
                records.not_saved(reason)
                raise Unavailable(f"The state could not be saved: {reason}.", RETRY_SECONDS)
            return new, await self.serving.aside(self.client).run(sys.maxsize, header.read, new.path)
        except BaseException:
            records.discard(new.id)
            asyncio.get_running_loop().call_later(LATE_SECONDS, records.discard, new.id)
            raise

    def _request(self, source: Source, tokens: Sequence[int], optional: bool = True) -> GenerationRequest:
        """Has the model read the tokens; the one that it then draws is nobody's."""
        return GenerationRequest(
            origin=self.client.origin(),
            prompts=[Prompt(tokens, source.param, latents=latent_positions(tokens))],
            max_tokens=1,
            max_tokens_param=None,
            sampling=SamplingParams(temperature=0),
            ignore_eos=True,
            salt=source.salt,
            state=source.begin,
            state_optional=optional,
        )


@contextlib.contextmanager
def _named_file() -> Iterator[None]:
    """An error about the state, or about what the model makes of it, is one about the file that the client sent."""
    try:
        yield
    except InvalidRequest as error:
        param = header.FILE if error.param == "state" else error.param
        raise InvalidRequest(error.message, param, error.code or INVALID) from error
    except NotFinite as error:
        text = "The state cannot be used: what the model computes after it is NaN or infinite."
        raise InvalidRequest(text, header.FILE, INVALID) from error
