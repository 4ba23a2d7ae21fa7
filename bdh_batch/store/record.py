"""What is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Record:
    """Something that is stored.

    Args:
        kind: "response" or "state".
        owner: whose it is; nobody else finds it.
        created, expires: Unix seconds; None is never.
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


ROW_BYTES = 256  # of a record beside its body and tokens, about


class Records(Protocol):
    """Where records are. All methods raise BDHError where they cannot read or write."""

    async def put(self, record: Record) -> None:
        """Stores a record, in place of an earlier one of its kind and id."""

    async def get(self, kind: str, id: str, owner: str) -> Record | None:
        """Returns a record; None where there is none, it is somebody else's, or it has expired."""

    async def delete(self, kind: str, id: str, owner: str) -> bool:
        """Deletes a record. Returns whether there was one."""
