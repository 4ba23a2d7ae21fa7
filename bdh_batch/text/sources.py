"""The kinds of structured output that clients can ask for: JSON schemas, expressions, choices, grammars, tools.

Nothing here looks into it: that is done in the sandbox (`probation.py`), once its size is known to be within bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from bdh_batch.errors import InvalidRequest

ANY_OBJECT = {"type": "object"}
Kind = Literal["schema", "regex", "choice", "lark", "calls"]


@dataclass(frozen=True, slots=True)
class Source:
    """One request for structured output.

    Args:
        value: what was asked for, as JSON.
        param: the field of the request that it comes from.
        parts: of which it is made; errors in one of them name that part.
        trigger: where there is one, text is free until that has been said, and then follows the grammar.
    """

    kind: Kind
    value: Any
    param: str
    parts: Sequence[Source] = ()
    trigger: str = ""

    def written(self, most_bytes: int) -> bytes:
        """All of it, as the sandbox reads it.

        Raises:
            InvalidRequest: it, or a part of it, has more bytes than a schema or grammar may.
        """
        for part in self.parts:
            _bounded(part.value, part.param, most_bytes)
        _bounded(self.value, self.param, most_bytes)
        return orjson.dumps(list(self._tree()))

    def _tree(self) -> Iterator[Any]:
        yield self.kind
        yield self.value
        yield self.param
        yield [list(part._tree()) for part in self.parts]


def from_schema(schema: Mapping[str, Any], param: str, strict: bool = False) -> Source:
    """Responses that satisfy `schema`. What cannot be kept to is refused where it is `strict`, else it is left out."""
    return Source("schema", [schema, strict], param)


def from_regex(regex: str, param: str) -> Source:
    return Source("regex", regex, param)


def from_choice(choices: Sequence[str], param: str) -> Source:
    return Source("choice", choices, param)


def from_lark(grammar: str, param: str) -> Source:
    return Source("lark", grammar, param)


def _bounded(value: Any, param: str, most: int) -> None:
    # What is plainly too long need not be written down to be counted.
    size = len(value) if isinstance(value, str | list) else 0
    try:
        size = size if size > most else len(value.encode()) if isinstance(value, str) else len(orjson.dumps(value))
    except orjson.JSONEncodeError as error:  # a recursion that is too deep is one, too
        raise InvalidRequest(f"{param}: It is nested too deeply ({error}).", param) from error
    if size > most:
        text = f"The schema or grammar has {size} bytes, more than the limit of {most} (limits.max_schema_bytes)."
        raise InvalidRequest(f"{param}: {text}", param)
