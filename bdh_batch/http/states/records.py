"""Saved states as they are stored, and what a request begins in."""

from __future__ import annotations

import contextlib
import secrets
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import orjson

from bdh_batch.errors import InvalidRequest, StoreFailed
from bdh_batch.http.errors import NotFound
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.request.client import Client
from bdh_batch.http.states import header
from bdh_batch.http.states.header import Header
from bdh_batch.messages import Prompt, StateLayout, latent_positions
from bdh_batch.messages.state import INVALID, SavedState
from bdh_batch.store.record import Record, reading
from bdh_batch.store.records import StateFile, Store
from bdh_batch.system.threads import in_daemon_thread

KIND, PREFIX = "state", "st_"
LONGEST_ID = 128  # characters of one that an error repeats


@dataclass(frozen=True, slots=True)
class About:
    """What is known of a state beside its tokens: the body of its record.

    Args:
        tokens: how many there are. Its file has read all of them.
        size: of its file, in bytes.
        salt: of all requests that begin in it. What a client has uploaded is a prefix of nobody else's.
    """

    model: str
    tokens: int
    fingerprint: str = ""
    dtype: str = ""
    size: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)
    salt: str = ""

    @classmethod
    def of(cls, record: Record) -> About:
        """Raises RecordDamaged."""
        with reading(record):
            return cls(**orjson.loads(record.body))

    def body(self) -> bytes:
        return orjson.dumps(asdict(self))

    def check(self, layout: StateLayout | None) -> None:
        """Raises InvalidRequest: it is of other weights than those of an engine whose states are of that layout."""
        if layout is not None and self.fingerprint != layout.fingerprint:
            raise InvalidRequest("The state cannot be used: it is a state of another model.", "state", INVALID)

    def with_file(self, found: Header) -> About:
        return replace(self, fingerprint=found.fingerprint, dtype=found.dtype, size=found.size)


def new_record(about: About, tokens: array[int], owner: str, ttl: float | None, state: str | None = None) -> Record:
    """A record for a state; `state` is the id of its file, where it shares that of another."""
    now = time.time()
    return Record(
        id=PREFIX + secrets.token_hex(16),
        kind=KIND,
        owner=owner,
        created=now,
        expires=None if ttl is None else now + ttl,
        body=about.body(),
        tokens=tokens.tobytes(),
        state=state,
    )


def shown(record: Record) -> dict[str, Any]:
    """A state as responses have it."""
    about = About.of(record)
    return {
        "id": record.id,
        "object": KIND,
        "created_at": int(record.created),
        "expires_at": None if record.expires is None else int(record.expires),
        "model": about.model,
        "fingerprint": about.fingerprint,
        "dtype": about.dtype,
        "tokens": about.tokens,
        "bytes": 0 if record.state is None else about.size,
        "metadata": about.metadata,
    }


async def found(records: Store, id: str, owner: str, param: str | None = None) -> Record:
    """The state of that id. Raises NotFound: there is none, none any more, or it is somebody else's."""
    record = await records.get(KIND, id, owner) if id.startswith(PREFIX) else None
    if record is None:
        raise NotFound(f"State with id {id[:LONGEST_ID]!r} not found.", param, "not_found")
    return record


async def opened_file(records: Store, record: Record) -> tuple[StateFile, Header] | None:
    """The file of a record's state, and its header; None where there is none any more. One that is damaged goes.

    Raises StoreFailed.
    """
    file = await records.state_file(record)
    if file is None:
        return None
    try:
        return file, await in_daemon_thread(partial(header.read, file.path), "bdh-state-files")
    except InvalidRequest as error:
        file.close()
        await records.damaged(file.id, error.message)
        return None
    except OSError as error:
        file.close()
        raise StoreFailed(f"The file of the state cannot be read ({error.strerror}).") from error
    except BaseException:  # whoever wanted it has left
        file.close()
        raise


@dataclass(frozen=True, slots=True)
class Beginning:
    """What a request begins in: all of its prompts come after these tokens.

    Args:
        state: a file with the state after them; None where there is none any more.
        salt: see `About`.
    """

    tokens: array[int]
    state: SavedState | None
    salt: str = ""

    @classmethod
    async def of(cls, records: Store, client: Client, model: ServedModel, id: str) -> Beginning:
        """The state of that id, which stays readable until the client's request has ended.

        Raises:
            NotFound
            InvalidRequest: it is another model's.
            StoreFailed
        """
        record = await found(records, id, client.caller.owner, "state")
        about = About.of(record)
        if about.model != model.name:
            text = f"The state is of the model {about.model!r}, not of {model.name!r}."
            raise InvalidRequest(text, "state", INVALID)
        about.check(model.layout)
        state = opened = None
        with contextlib.suppress(StoreFailed):  # which was counted; the tokens are there
            opened = await opened_file(records, record)
        if opened is not None:
            file, known = opened
            client.cleanup.callback(file.close)
            known.check(model.layout, "state")
            state = SavedState(str(file.path), about.tokens)
        return cls(array("i", record.tokens), state, about.salt)

    def before(self, prompts: Sequence[Prompt], most: int) -> list[Prompt]:
        """The prompts with its tokens before them. Raises InvalidRequest: together they have more tokens than `most`,
        where there are several."""
        known, latents = len(self.tokens), latent_positions(self.tokens)
        if len(prompts) > 1 and known * len(prompts) > most:
            text = f"The state's {known} tokens are too many for {len(prompts)} prompts; together they may have {most}"
            raise InvalidRequest(f"{text} (limits.max_values).", "prompt")
        return [
            Prompt([*self.tokens, *each.tokens], each.param, (known, *(known + at for at in each.breaks)), latents)
            for each in prompts
        ]
