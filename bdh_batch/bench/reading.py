"""Responses as they come: a stream of tokens, or JSON in one piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from bdh_batch.bench.outcome import Failed, Outcome
from bdh_batch.bench.sse import Events

DONE = b"[DONE]"
ERROR_BYTES = 2000  # as much of an error's body is kept
VISIBLE = ("content", "reasoning_content", "reasoning", "tool_calls", "function_call")


class Whole:
    """A response in one piece."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.failure: Failed | None = None
        self._status = 0
        self._body = b""

    def begin(self, status: int, content_type: str) -> None:
        self._status = status

    def take(self, body: bytes, now: float) -> None:
        self._body += body

    def json(self) -> Any:
        """Raises Failed where it is an error, or no JSON."""
        if self._status != 200:
            raise refusal(self._status, self._body)
        try:
            return orjson.loads(self._body)
        except orjson.JSONDecodeError as error:
            raise Failed("malformed_http", f"the response is no JSON: {error}") from None


class Stream:
    """Writes what a stream says into its outcome; `count` is called with tokens as they come."""

    def __init__(self, outcome: Outcome, count: Callable[[int], None]) -> None:
        self.failure: Failed | None = None
        self._outcome = outcome
        self._count = count
        self._events = Events()
        self._status = 0
        self._error = b""
        self._done = False

    @property
    def sent(self) -> float:
        return self._outcome.sent

    @sent.setter
    def sent(self, moment: float) -> None:
        self._outcome.sent = moment

    def begin(self, status: int, content_type: str) -> None:
        self._status = status
        if status == 200 and not content_type.lower().startswith("text/event-stream"):
            self.failure = Failed(
                "malformed_sse", f"the response is {content_type or 'of no type'}, not text/event-stream"
            )

    def take(self, body: bytes, now: float) -> None:
        if self._status != 200:
            self._error = (self._error + body)[:ERROR_BYTES]
        elif self.failure is None:
            try:
                for name, data in self._events.feed(body):
                    self._event(name, data, now)
            except Failed as failed:
                self.failure = failed

    def finish(self) -> None:
        """To be called when the response is whole. Raises Failed where it is not one."""
        if self.failure is not None:
            raise self.failure
        if self._status != 200:
            raise refusal(self._status, self._error)
        if self._events.unfinished or not self._done:
            raise Failed("closed_mid_stream", "the stream ended before `data: [DONE]`")
        if not self._outcome.times:
            raise Failed("no_tokens", "the stream bore no token")

    def _event(self, name: bytes, data: bytes, now: float) -> None:
        if self._done:
            raise Failed("malformed_sse", "an event after `data: [DONE]`")
        if data == DONE:
            self._done = True
            return
        if name == b"error":
            raise Failed("error_event", _complaint(data))
        event = _object(data)
        if event.get("error") or event.get("object") == "error":
            raise Failed("error_event", _complaint(data))
        if isinstance(usage := event.get("usage"), dict):
            self._usage(usage)
        if choices := event.get("choices"):
            self._choices(choices, now)

    def _usage(self, usage: dict[str, Any]) -> None:
        if isinstance(reported := usage.get("completion_tokens"), int):
            self._outcome.reported_tokens = reported
        if isinstance(reported := usage.get("prompt_tokens"), int):
            self._outcome.reported_prompt_tokens = reported

    def _choices(self, choices: object, now: float) -> None:
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise Failed("malformed_sse", "an event whose choices are no list of objects")
        outcome = self._outcome
        tokens, whence = 0, "events"
        for choice in choices:
            contained, source = tokens_of(choice)
            tokens += contained
            whence = source if contained else whence
            outcome.pieces.append(text_of(choice))
        outcome.ended = now
        if tokens:
            outcome.times.append(now)
            outcome.listed_tokens += tokens
            outcome.listed_by = whence
            self._count(tokens)


def tokens_of(choice: dict[str, Any]) -> tuple[int, str]:
    """How many tokens an event has, and what says so.

    Where it lists none, it has one if it shows something, or if there is nothing else that it could be for: an event
    that only names the role or the reason of the end has none.
    """
    logprobs = choice.get("logprobs")
    given = logprobs if isinstance(logprobs, dict) else {}
    for listed, whence in (
        (choice.get("token_ids"), "token_ids"),
        (given.get("tokens"), "logprobs"),
        (given.get("content"), "logprobs"),
    ):
        if isinstance(listed, list):
            return len(listed), whence
    delta = choice.get("delta")
    if isinstance(delta, dict):
        other_use = "role" in delta or choice.get("finish_reason")
        shows = any(delta.get(name) for name in VISIBLE)
    else:
        other_use, shows = choice.get("finish_reason"), bool(choice.get("text"))
    return int(shows or not other_use), "events"


def text_of(choice: dict[str, Any]) -> str:
    held = choice["delta"].get("content") if isinstance(choice.get("delta"), dict) else choice.get("text")
    return held if isinstance(held, str) else ""


def refusal(status: int, body: bytes) -> Failed:
    """A response with another status than 200."""
    return Failed(f"http_{status}", _complaint(body))


def _complaint(body: bytes) -> str:
    """The message of an error, if it has OpenAI's shape; else all of it."""
    try:
        held = orjson.loads(body)
    except orjson.JSONDecodeError:
        held = body.decode("utf-8", "replace")
    for key in ("error", "message"):
        held = held.get(key, held) if isinstance(held, dict) else held
    return " ".join(str(held).split())[:300]


def _object(data: bytes) -> dict[str, Any]:
    try:
        held = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise Failed("malformed_sse", f"an event that is no JSON: {error}: {data[:80]!r}") from None
    if not isinstance(held, dict):
        raise Failed("malformed_sse", f"an event that is no object: {data[:80]!r}")
    return held
