"""Merges what an upstream sent of a choice beside its text, piece by piece, into what a whole response has of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from io import StringIO
from typing import Any

NAMES = frozenset(("id", "type", "name"))  # members of a call that are sent once


def merged(extras: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the `delta` and the `logprobs` of all of a choice's extras: texts and lists are put together, calls of
    tools by their index. It takes time that depends on what there is, not on how often it is added to."""
    delta: dict[str, Any] = {}
    logprobs: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for extra in extras:
        members = dict(extra.get("delta", ()))
        for call in members.pop("tool_calls", ()):
            _add(calls.setdefault(call["index"], {}), {name: call[name] for name in call if name != "index"})
        _add(delta, members)
        _add(logprobs, extra.get("logprobs") or {})
    if calls:
        delta["tool_calls"] = [_written(call) for call in calls.values()]
    whole = {"delta": delta} | ({"logprobs": logprobs} if logprobs else {})
    return {name: _written(value) for name, value in whole.items()}


def _add(whole: dict[str, Any], part: Mapping[str, Any]) -> None:
    for name, value in part.items():
        if isinstance(value, dict):
            _add(whole.setdefault(name, {}), value)
        elif isinstance(value, list):
            whole.setdefault(name, []).extend(value)
        elif isinstance(value, str) and name not in NAMES:
            whole.setdefault(name, StringIO()).write(value)
        elif value is not None:
            whole.setdefault(name, value)


def _written(value: Any) -> Any:
    if isinstance(value, StringIO):
        return value.getvalue()
    if isinstance(value, dict):
        return {name: _written(each) for name, each in value.items()}
    return value
