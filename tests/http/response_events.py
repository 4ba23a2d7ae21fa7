"""The order of the events of the Responses API."""

from __future__ import annotations

from typing import Any

from bdh_batch.http.responses_api.responses import ResponseEvent

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


def in_order(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Walks the states of a whole stream, and returns its response, which has what the events have."""
    state, item, text, output = "new", -1, "", []
    for number, event in enumerate(events):
        ResponseEvent.model_validate(event)
        assert event["sequence_number"] == number
        kind = event["type"]
        state = "failing" if kind == "error" and state != "over" else MOVES[state, kind]
        item += kind == "response.output_item.added"
        assert event.get("output_index", item) == item
        if kind == "response.output_item.added":
            text, id = "", event["item"]["id"]
        elif kind.endswith(".delta"):
            text += event["delta"]
            assert event["item_id"] == id
        elif kind in ("response.output_text.done", "response.function_call_arguments.done"):
            assert event.get("text", event.get("arguments")) == text
        elif kind == "response.output_item.done":
            output.append(event["item"])
    assert state == "over"
    final: dict[str, Any] = events[-1]["response"]
    assert final["status"] == events[-1]["type"].removeprefix("response.")
    ended, rest = final["output"][: len(output)], final["output"][len(output) :]
    assert ended == output  # what has ended stays as it was, whatever becomes of the response
    assert [each["status"] for each in rest] == ["incomplete"] * (item + 1 - len(output))
    assert not rest or final["status"] == "failed"
    return final
