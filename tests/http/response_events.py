"""The order of the events of the Responses API."""

from __future__ import annotations

from typing import Any

from bdh_batch.http.responses_api.responses import ResponseEvent
from tests.http import open_responses

MOVES = {
    ("new", "response.created"): "created",
    ("created", "response.queued"): "queued",
    ("created", "response.in_progress"): "between",
    ("queued", "response.in_progress"): "between",
    ("between", "response.output_item.added"): "item",
    ("item", "response.content_part.added"): "text",
    ("text", "response.output_text.delta"): "text",
    ("text", "response.output_text.done"): "text done",
    ("text done", "response.content_part.done"): "item done",
    ("item", "response.function_call_arguments.delta"): "call",
    ("call", "response.function_call_arguments.delta"): "call",
    ("item", "response.function_call_arguments.done"): "item done",
    ("call", "response.function_call_arguments.done"): "item done",
    ("item done", "response.output_item.done"): "between",
    ("between", "response.completed"): "over",
    ("between", "response.incomplete"): "over",
    ("failing", "response.failed"): "over",
}
MOVES |= {(state, "error"): "failing" for state in {*MOVES.values()} - {"over", "failing"} | {"new"}}


class ResponseEvents:
    """Walks the states of a stream, event by event.

    Args:
        first: the number of its first event; one that does not begin at 0 may be in any state by then.
        may_stop: whether it may end anywhere, as that of a response in the background does which is cancelled.
    """

    done = "[DONE]"  # follows the last event

    def __init__(self, first: int = 0, may_stop: bool = False) -> None:
        self._may_stop = may_stop
        self._states = {"new"} if first == 0 else {*MOVES.values()}
        self._next = first
        self._item: int | None = -1 if first == 0 else None  # the index of the last one; None where it is not known
        self._id = self._text = ""
        self._output: list[Any] | None = [] if first == 0 else None
        self.response: dict[str, Any] = {}

    def take(self, event: dict[str, Any]) -> None:
        ResponseEvent.model_validate(event)
        open_responses.check_event(event)
        assert event["sequence_number"] == self._next
        self._next += 1
        kind = event["type"]
        moved = {MOVES[state, kind] for state in self._states if (state, kind) in MOVES}
        assert moved, f"{kind} comes in {self._states}"
        self._states = moved
        if "output_index" in event:
            self._in_item(kind, event)
        self.response = event.get("response", self.response)
        if moved == {"over"}:
            self._over(kind)

    def _in_item(self, kind: str, event: dict[str, Any]) -> None:
        is_new = kind == "response.output_item.added"
        if self._item is not None:
            assert event["output_index"] == self._item + is_new
        self._item = event["output_index"]
        if is_new:
            self._text, self._id = "", event["item"]["id"]
        if not self._id:  # what came before the first event was not seen
            return
        assert event.get("item_id", self._id) == self._id
        if kind.endswith(".delta"):
            self._text += event["delta"]
        elif kind in ("response.output_text.done", "response.function_call_arguments.done"):
            assert event.get("text", event.get("arguments")) == self._text
        elif kind == "response.output_item.done":
            assert event["item"]["id"] == self._id
            if self._output is not None:
                self._output.append(event["item"])

    def _over(self, kind: str) -> None:
        """The response has what the events have."""
        assert self.response["status"] == kind.removeprefix("response.")
        if self._output is None or self._item is None:
            return
        number = len(self._output)
        ended, rest = self.response["output"][:number], self.response["output"][number:]
        assert ended == self._output  # what has ended stays as it was, whatever becomes of the response
        assert [each["status"] for each in rest] == ["incomplete"] * (self._item + 1 - number)
        assert not rest or self.response["status"] == "failed"

    def end(self) -> None:
        assert self._may_stop or "over" in self._states, f"the stream ends in {self._states}"


def in_order(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Walks a whole stream, and returns its response."""
    walk = ResponseEvents()
    for event in events:
        walk.take(event)
    walk.end()
    return walk.response
