"""Reads JSON text of bounded size: a body, or a string in it that is JSON itself.

A parser holds the interpreter's lock for as long as it takes, and four megabytes of `[[],[],…]` take half a second. So
what would take long is refused before it is parsed, by counting what stands outside of strings.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import orjson

from bdh_batch.settings import Limits

NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
STEPS = [{91: 1, 123: 1, 93: -1, 125: -1}.get(byte, 0) for byte in range(256)]  # in depth, by bracket
PARSER_DEPTH = 1024  # what is deeper is no JSON to the parser


class ExceedsLimit(ValueError):
    """JSON text has more in it than an option of `limits` allows. The message goes on after the name of the text.

    Args:
        values: of the text, where they were read all the same.
    """

    def __init__(self, message: str, values: Any = None) -> None:
        super().__init__(message)
        self.values = values


def read_json(raw: bytes, limits: Limits) -> Any:
    """The values of JSON text.

    Raises:
        JSONDecodeError: it is none.
        ExceedsLimit: it has more values, strings, lists and objects, or deeper ones, than `limits` allow.
    """
    containers = raw.count(b"[") + raw.count(b"{")  # those in strings count, too, where they do no harm
    few = containers <= min(limits.max_depth, limits.max_containers)
    if few and containers + raw.count(b",") < limits.max_values and raw.count(b'"') <= 2 * limits.max_strings:
        return orjson.loads(raw)
    depth = _depth(raw, limits)
    values = orjson.loads(raw)
    if depth > limits.max_depth:
        raise ExceedsLimit(f"is nested more than {limits.max_depth} deep (limits.max_depth)", values)
    return values


def _depth(raw: bytes, limits: Limits) -> int:
    """How deep JSON text is nested, by what stands outside of its strings. Raises ExceedsLimit as `read_json` does."""
    without_escapes = _without_escapes(raw)
    if without_escapes.count(b'"') > 2 * limits.max_strings:
        raise ExceedsLimit(f"has more than {limits.max_strings} strings (limits.max_strings)")
    outside = _outside(without_escapes)
    brackets = outside.translate(None, NO_BRACKETS)
    containers = brackets.count(b"[") + brackets.count(b"{")
    depth = max(accumulate(map(STEPS.__getitem__, brackets[: 2 * limits.max_containers])), default=0)
    if containers > limits.max_containers and depth <= PARSER_DEPTH:  # what is deeper the parser refuses, and soon
        raise ExceedsLimit(f"has more than {limits.max_containers} lists and objects (limits.max_containers)")
    if containers + outside.count(b",") >= limits.max_values:
        raise ExceedsLimit(f"has more than {limits.max_values} values (limits.max_values)")
    return depth


def outside_strings(raw: bytes) -> bytes:
    """What of JSON text stands outside of its strings, of which there should be few."""
    return _outside(_without_escapes(raw))


def _without_escapes(raw: bytes) -> bytes:
    return raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw


def _outside(without_escapes: bytes) -> bytes:
    return b"".join(without_escapes.split(b'"')[::2])


def deeper(value: object, most: int) -> bool:
    """Whether lists and objects are nested more than `most` deep in `value`, which counts itself if it is one."""
    level = [value]
    for _ in range(most):
        level = [item for outer in level for item in _items(outer)]
    return any(isinstance(item, list | dict) for item in level)


def _items(value: object) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
