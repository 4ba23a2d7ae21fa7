"""The content of a whole response, put together from its parts: text, and uses of tools with their inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic_core import from_json

from bdh_batch.http.responses.json_pieces import dump_text
from bdh_batch.text.calls import Argued
from bdh_batch.text.parts import Part, Uses


@dataclass(slots=True)
class _Block:
    """A block of the content; `texts` are of its text, or of its input."""

    use: Uses | None
    texts: list[str] = field(default_factory=list)

    def pieces(self) -> list[bytes]:
        """Its JSON."""
        text = "".join(self.texts)
        if self.use is None:
            return [b'{"type":"text","text":', *dump_text(text), b"}"]
        head = orjson.dumps({"type": "tool_use", "id": self.use.id, "name": self.use.name})
        return [head[:-1], b',"input":', input_object(text), b"}"]


class Content:
    """Collects the parts of one response."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._uses: dict[int, _Block] = {}

    def add(self, part: Part) -> None:
        if isinstance(part, Argued):
            self._uses[part.index].texts.append(part.text)
        elif isinstance(part, Uses):
            self._uses[part.index] = block = _Block(part)
            self._blocks.append(block)
        else:
            if not self._blocks or self._blocks[-1].use is not None:
                self._blocks.append(_Block(None))
            self._blocks[-1].texts.append(part.text)

    def blocks(self) -> Iterator[list[bytes]]:
        """The JSON of each block, in pieces."""
        return (block.pieces() for block in self._blocks)


def input_object(text: str) -> bytes:
    """The JSON object that is the input of a tool, of what the model has written.

    A whole one is left as it is, to the last digit. Of one that was cut off, there is what is complete. What is no
    object is the member `arguments` of one.
    """
    if not text.strip():
        return b"{}"
    try:
        if isinstance(from_json(text, allow_inf_nan=False), dict):
            return text.encode()
    except ValueError:
        pass
    try:
        begun: Any = from_json(text, allow_inf_nan=False, allow_partial=True)
        if isinstance(begun, dict):
            return json.dumps(begun).encode()
    except ValueError:
        pass
    return orjson.dumps({"arguments": text})
