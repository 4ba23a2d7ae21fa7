"""What is stored, how much of it may be, and what those who store see of the store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bdh_batch.errors import StoreFailed


class RecordDamaged(StoreFailed):
    """500: raised where a record has another content than what was stored."""


@dataclass(frozen=True, slots=True)
class Record:
    """Something that is stored.

    Args:
        kind: "response" or "state".
        owner: whose it is (`Caller.owner`); nobody else finds it.
        created, expires: Unix seconds; None is as late as the store allows.
        parent: the id of the response that it goes on from.
        body: JSON.
        tokens: all that its state has read, or would have: int32.
        state: the id of the file with its state; None where there is none, or none any more.
    """

    id: str
    kind: str
    owner: str
    created: float
    expires: float | None = None
    parent: str | None = None
    body: bytes = b"{}"
    tokens: bytes = b""
    state: str | None = None

    @property
    def size(self) -> int:
        """Bytes that it counts for, but for its state's."""
        return ROW_BYTES + len(self.body) + len(self.tokens)


@contextlib.contextmanager
def reading(record: Record) -> Iterator[None]:
    """Within it, a record's content is read: what that raises becomes RecordDamaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise RecordDamaged(f"The stored {record.kind} {record.id} is damaged.") from error


ROW_BYTES = 256  # of a record beside its body and tokens, about


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """The most that a store holds, of all owners, and the most bytes of one owner; None is no limit of its own."""

    records: int
    bytes: int
    bytes_per_owner: int | None = None


class Records(Protocol):
    """Where records are. All methods raise BDHError where they cannot read or write."""

    async def put(self, record: Record) -> None:
        """Stores a record, in place of an earlier one of its kind and id."""

    async def update(self, record: Record) -> bool:
        """Gives a record that is there a new body and tokens; returns False where it is not there any more."""

    async def get(self, kind: str, id: str, owner: str) -> Record | None:
        """Returns a record; None where there is none, it is somebody else's, or it has expired."""

    async def delete(self, kind: str, id: str, owner: str) -> bool:
        """Deletes a record. Returns whether there was one."""

    async def list(self, kind: str, owner: str, limit: int, after: str | None = None) -> Sequence[Record]:
        """Returns the newest records of an owner, without their tokens: those older than the one of the id `after`."""
