"""The parts of a response, text and calls of tools, as they come: from the model's text, or from an upstream."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bdh_batch.messages import Delta
from bdh_batch.text.calls import Argued, Called, CallReader, Piece, Said


@dataclass(frozen=True, slots=True)
class Uses(Called):
    """A use of a tool begins: a call that has an id."""

    id: str


Part = Said | Uses | Argued


class Parts:
    """Turns deltas into the parts of a response's content.

    Args:
        tools: the names of those whose calls are looked for in the text; None where there are none in it.
        prefix: of the ids that calls get.
    """

    def __init__(self, tools: Sequence[str] | None, prefix: str) -> None:
        self._prefix = prefix
        self._reader = None if tools is None else CallReader(tools)
        self._uses: dict[int, Uses] = {}

    def of(self, delta: Delta) -> list[Part]:
        parts = [self._part(piece) for piece in self._pieces(delta)]
        for extra in delta.extras or ():
            parts += self._of_upstream(extra.get("delta", {}))
        return parts

    @property
    def ends_with_a_call(self) -> bool:
        if self._reader is None:
            return bool(self._uses)
        return self._reader.calls > 0 and not self._reader.inside

    def _pieces(self, delta: Delta) -> Sequence[Piece]:
        if self._reader is None:
            return [Said(delta.text)] if delta.text else ()
        pieces = self._reader.push(delta.text)
        return pieces if delta.finish_reason is None else pieces + self._reader.flush()

    def _part(self, piece: Piece) -> Part:
        return self._use(piece.index, piece.name, None) if isinstance(piece, Called) else piece

    def _use(self, index: int, name: str, id: str | None) -> Uses:
        self._uses[index] = use = Uses(index, name, id or f"{self._prefix}_{secrets.token_hex(12)}")
        return use

    def _of_upstream(self, members: Mapping[str, Any]) -> Iterable[Part]:
        """The parts of what an upstream sent beside text. Its thoughts are none: nobody can ask for them here."""
        if refusal := members.get("refusal"):
            yield Said(refusal)
        for call in members.get("tool_calls", ()):
            function = call["function"]
            if call["index"] not in self._uses:
                yield self._use(call["index"], function.get("name", ""), call.get("id"))
            if arguments := function.get("arguments"):
                yield Argued(call["index"], arguments)
