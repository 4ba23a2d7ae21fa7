"""The completions that ended a short while ago: their tokens, by whose request they were of. In memory alone."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

TOKEN_BYTES = 36  # of a token in a list, about
MOST_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Completion:
    """The first choice of a request: its prompt, and what was drawn.

    `salt` is that of the request: its prefixes are shared with those of the same one only.
    """

    model: str
    salt: str
    prompt: Sequence[int]
    drawn: Sequence[int] = ()

    @property
    def size(self) -> int:
        return TOKEN_BYTES * (1 + len(self.prompt) + len(self.drawn))

    def tokens(self) -> array[int]:
        """All of them, as 32-bit integers."""
        tokens = array("i", iter(self.prompt))
        tokens.extend(self.drawn)
        return tokens


Asked = Callable[[str, str], Awaitable[Completion | None]]


class Recent:
    """Remembers completions, within limits: the oldest go, of the owner whose take most.

    Args:
        most: completions.
        most_bytes: of all.
    """

    def __init__(self, most: int, most_bytes: int = MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._owned: dict[str, OrderedDict[str, Completion]] = {}
        self._sizes: dict[str, int] = {}
        self._count = 0
        self._others: Asked | None = None

    def join(self, others: Asked) -> None:
        """From now on, what this process does not remember is asked for from others."""
        self._others = others

    def add(self, owner: str, id: str, completion: Completion) -> None:
        """Remembers the completion of a request, in place of an earlier one of that id."""
        self._remove(owner, id)
        if completion.size > self._most_bytes or not self._most:
            return
        self._owned.setdefault(owner, OrderedDict())[id] = completion
        self._sizes[owner] = self._sizes.get(owner, 0) + completion.size
        self._count += 1
        while self._count > self._most or sum(self._sizes.values()) > self._most_bytes:
            others = [each for each, owned in self._owned.items() if each != owner or len(owned) > 1]
            largest = max(others, key=self._sizes.__getitem__)
            self._remove(largest, next(iter(self._owned[largest])))

    def get(self, owner: str, id: str) -> Completion | None:
        """What this process remembers."""
        owned = self._owned.get(owner)
        return None if owned is None else owned.get(id)

    async def find(self, owner: str, id: str) -> Completion | None:
        """What this process remembers, or another one of the server."""
        found = self.get(owner, id)
        return found if found is not None or self._others is None else await self._others(owner, id)

    def _remove(self, owner: str, id: str) -> None:
        if (completion := self.get(owner, id)) is None:
            return
        del self._owned[owner][id]
        self._count -= 1
        self._sizes[owner] -= completion.size
        if not self._owned[owner]:
            del self._owned[owner], self._sizes[owner]
