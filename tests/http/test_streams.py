"""What looks at all streams of the tests: every client's are seen, and what is wrong with one is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import pytest

from tests.http import message_events, response_events
from tests.streams import Stream

if TYPE_CHECKING:
    from tests.conftest import Server

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
USER: Any = {"role": "user", "content": "a"}
ASKED: Any = {"model": "tiny", "input": "a", "max_output_tokens": 3, "temperature": 0}
MESSAGE: Any = {"model": "tiny", "max_tokens": 3, "messages": [USER]}
EVENTS = {RESPONSES: response_events.ResponseEvents, MESSAGES: message_events.MessageEvents}
Change = Callable[[list[bytes]], object]


async def test_the_streams_of_every_client_are_looked_at(
    tiny: Server, wrong_responses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_events, "MOVES", {("never", "response.created"): "never"})
    monkeypatch.setattr(message_events, "MOVES", {})
    tiny.http.post(RESPONSES, json=ASKED | {"stream": True})
    with tiny.openai() as client:
        assert [*client.responses.create(**ASKED, stream=True)]
    async with tiny.async_openai() as other:
        assert [event async for event in await other.responses.create(**ASKED, stream=True)]
    async with httpx.AsyncClient(base_url=tiny.url, timeout=None) as third:
        await third.post(MESSAGES, json=MESSAGE | {"stream": True})
    with anthropic.Anthropic(base_url=tiny.url, api_key="none") as fourth, fourth.messages.stream(**MESSAGE) as stream:
        assert stream.get_final_text()
    found, wrong_responses[:] = [*wrong_responses], []
    assert [each.partition(": ")[0] for each in found] == [
        *[f"POST {tiny.url}{RESPONSES}"] * 3,
        *[f"POST {tiny.url}{MESSAGES}"] * 2,
    ]


CHANGES: dict[str, Change] = {
    "one is missing": lambda frames: frames.pop(1),
    "the first is missing": lambda frames: frames.pop(0),
    "the last is missing": lambda frames: frames.pop(),
    "one comes twice": lambda frames: frames.insert(1, frames[1]),
    "two are exchanged": lambda frames: frames.insert(1, frames.pop(2)),
    "something follows": lambda frames: frames.append(frames[-2]),
    "a name is another": lambda frames: frames.insert(0, frames.pop(0).replace(b"event: ", b"event: x")),
    "a field is missing": lambda frames: frames.insert(0, frames.pop(0).replace(b'"model":', b'"x":')),
    "half of one": lambda frames: frames.append(frames.pop()[:-2]),
}


@pytest.mark.parametrize("path", EVENTS)
def test_what_is_wrong_with_a_stream_is_found(tiny: Server, path: str) -> None:
    body = (ASKED if path == RESPONSES else MESSAGE) | {"stream": True}
    *frames, rest = tiny.http.post(path, json=body).content.split(b"\n\n")
    frames = [frame for frame in frames if not frame.startswith((b":", b"event: ping"))]
    assert (rest, len(frames) > 4) == (b"", True)
    for name, change in {"nothing": lambda frames: None, **CHANGES}.items():
        changed, wrong = [frame + b"\n\n" for frame in frames], list[str]()
        change(changed)
        stream = Stream(name, wrong, EVENTS[path]())
        for piece in changed:
            stream.take(piece[:5])
            stream.take(piece[5:])
        stream.take(b"", last=True)
        assert len(wrong) == (name != "nothing"), (name, wrong)
