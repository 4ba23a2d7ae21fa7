"""What is stored, and how much of it may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """Something that is stored.

    Args:
        kind: "response" or "state".
        owner: whose it is (`Caller.owner`); nobody else finds it.
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


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """The most that a store holds, of all owners, and the most bytes of one owner; None is no limit of its own."""

    records: int
    bytes: int
    bytes_per_owner: int | None = None
