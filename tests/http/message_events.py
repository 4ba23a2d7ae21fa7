"""The order of the events of the Messages API."""

from __future__ import annotations

from typing import Any


def in_order(events: list[dict[str, Any]]) -> None:
    """Walks the states of a stream: begun, in block n, between blocks, at its end."""
    state, block = "new", -1
    moves = {
        ("new", "message_start"): "between",
        ("between", "content_block_start"): "inside",
        ("inside", "content_block_delta"): "inside",
        ("inside", "content_block_stop"): "between",
        ("between", "message_delta"): "ended",
        ("ended", "message_stop"): "over",
    }
    for event in (each for each in events if each["type"] != "ping"):
        state = moves[state, event["type"]]
        block += event["type"] == "content_block_start"
        assert event.get("index", block) == block
    assert state == "over"
