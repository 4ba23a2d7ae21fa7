"""Responses that end before they are complete, of deltas that a server of tests cannot be brought to stop at."""

from __future__ import annotations

from typing import Any

import pytest

from bdh_batch.errors import GenerationFailed
from bdh_batch.http.request.off_loop import OffLoop
from bdh_batch.http.responses.frames import ResponseOptions
from bdh_batch.http.responses_api.frames import ResponseFrames
from bdh_batch.http.responses_api.translation import NAMES
from bdh_batch.http.schema.other_names import Names
from bdh_batch.messages import Delta, FinishReason, Usage
from bdh_batch.text.tokenizer import ByteTokenizer

OPTIONS = ResponseOptions(
    *("resp_1", 0, "tiny", "", 1, 1, False, None, False, None, False, False, "", False, False),
)
TEXT = 'So: <tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "f", "arguments": {"a"'


def frames_of(tools: list[str] | None, **response: Any) -> ResponseFrames:
    return ResponseFrames(OPTIONS, ByteTokenizer(), response, Names(["input"], NAMES), tools, OffLoop().of("me"))


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_what_has_ended_stays_completed_where_the_response_does_not_end_well(end: str) -> None:
    frames = frames_of(["f"], store=True)
    sent = b"".join([frames.opening([]), *frames.delta(0, Delta(TEXT, [1]))])
    if end == "failed":
        sent += frames.failed(GenerationFailed("The engine is gone."))
        assert sent.endswith(b"\n\ndata: [DONE]\n\n")
        assert frames.response["store"] is False, "nobody will find it"
    else:
        frames.cancel()
    assert frames.response["status"] == end
    statuses = [item["status"] for item in frames.response["output"]]
    assert statuses == ["completed", "completed", "incomplete"]
    assert sent.count(b"event: response.output_item.done\n") == 2


async def test_an_upstream_has_no_more_calls_than_there_may_be() -> None:
    calls = [{"index": i, "id": f"call_{i}", "function": {"name": "f", "arguments": f"[{i}]"}} for i in range(4)]
    frames = frames_of(None, max_tool_calls=2)
    frames.opening([])
    frames.delta(0, Delta("", [1], extras=[{"delta": {"tool_calls": calls}}]))
    frames.delta(0, Delta(finish_reason=FinishReason.STOP))
    await frames.before_end(Usage(1, 1))
    assert [item["arguments"] for item in frames.response["output"]] == ["[0]", "[1]"]
    assert frames.response["status"] == "completed"
