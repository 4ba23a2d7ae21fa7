"""The order of the events of the Messages API."""

from __future__ import annotations

from typing import Any

from bdh_batch.http.anthropic.responses import AnthropicError, MessageEvent

MOVES = {
    ("new", "message_start"): "between",
    ("between", "content_block_start"): "inside",
    ("inside", "content_block_delta"): "inside",
    ("inside", "content_block_stop"): "between",
    ("between", "message_delta"): "ended",
    ("ended", "message_stop"): "over",
}
MOVES |= {(state, "error"): "over" for state in ("new", "between", "inside", "ended")}


class MessageEvents:
    """Walks the states of a stream, event by event: begun, in block n, between blocks, at its end."""

    done = None  # nothing follows the last event

    def __init__(self) -> None:
        self._state, self._block = "new", -1

    def take(self, event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "ping":
            return
        (AnthropicError if kind == "error" else MessageEvent).model_validate(event)
        assert (self._state, kind) in MOVES, f"{kind} comes in {self._state}"
        self._state = MOVES[self._state, kind]
        self._block += kind == "content_block_start"
        assert event.get("index", self._block) == self._block

    def end(self) -> None:
        assert self._state == "over", f"the stream ends in {self._state}"


def in_order(events: list[dict[str, Any]]) -> None:
    """Walks a whole stream."""
    walk = MessageEvents()
    for event in events:
        walk.take(event)
    walk.end()
