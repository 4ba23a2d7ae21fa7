"""Deltas that are written as they come, without the task that reads them, and when that is woken after all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import pytest

from bdh_batch.backends.base import Generation
from bdh_batch.backends.generation import MailboxGeneration, Running
from bdh_batch.engine import mailbox as module
from bdh_batch.engine.mailbox import BACKLOG, Deliveries, Mailbox
from bdh_batch.http.request.off_loop import OffLoop
from bdh_batch.http.responses.frames import Frames
from bdh_batch.http.responses.generation import EventStream
from bdh_batch.http.transport.exchange import EXCHANGE
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Origin, Prompt, SamplingParams, Usage

Deltas = Sequence[tuple[int, Delta]]


async def turns(count: int = 4) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


class Takes:
    """A taker that takes, or does not, and remembers what it was offered."""

    def __init__(self) -> None:
        self.willing = True
        self.taken: list[Deltas] = []

    def __call__(self, deltas: Deltas) -> bool:
        if self.willing:
            self.taken.append(deltas)
        return self.willing


async def test_a_taker_gets_what_comes_in_one_turn_at_once_and_the_reader_sleeps_on() -> None:
    deliveries, takes = Deliveries(), [Takes(), Takes()]
    boxes = [Mailbox(deliveries) for _ in takes]
    for box, each in zip(boxes, takes):
        box.offer_to(each)
    readers = [asyncio.create_task(box.take()) for box in boxes]
    await turns()
    for text in "ab":
        for box in boxes:
            box.put(0, Delta(text))
    await turns()
    assert [each.taken for each in takes] == [[[(0, Delta("a")), (0, Delta("b"))]]] * 2
    takes[0].willing = False
    for text in "cd":
        for box in boxes:
            box.put(0, Delta(text))
    assert await readers[0] == [(0, Delta("c")), (0, Delta("d"))]
    boxes[0].put(0, Delta("e"))  # nobody waits: it must not overtake what the reader is at
    await turns()
    assert (len(takes[0].taken), takes[1].taken[-1]) == (1, [(0, Delta("c")), (0, Delta("d"))])
    takes[0].willing = True
    assert await boxes[0].take() == [(0, Delta("e"))]
    readers[1].cancel()


async def test_what_was_merged_and_what_a_taker_fails_at_is_the_readers() -> None:
    box, takes = Mailbox(), Takes()
    box.offer_to(takes)
    reader = asyncio.create_task(box.take())
    await turns()
    for number in range(3 * BACKLOG):
        box.put(0, Delta(str(number % 10)))
    assert "".join(delta.text for _, delta in await reader) == "".join(str(n % 10) for n in range(3 * BACKLOG))
    assert not takes.taken

    def fail(deltas: Deltas) -> bool:
        raise ZeroDivisionError

    box.offer_to(fail)
    reader = asyncio.create_task(box.take())
    await turns()
    box.put(0, Delta("a"))
    with pytest.raises(ZeroDivisionError):
        await reader


async def test_a_crowd_of_mailboxes_lets_others_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TURN", 2)
    deliveries, takes = Deliveries(), Takes()
    boxes = [Mailbox(deliveries) for _ in range(5)]
    for box in boxes:
        box.offer_to(takes)
    readers = [asyncio.create_task(box.take()) for box in boxes]
    await turns()
    for box in boxes:
        box.put(0, Delta("a"))
    found = []
    for _ in range(4):
        found.append(len(takes.taken))
        await asyncio.sleep(0)
    assert found == [0, 2, 4, 5]
    for reader in readers:
        reader.cancel()


class Pieces:
    """Frames that are the text and nothing else."""

    continuous_usage, only_text = False, True

    def opening(self, prompts: object) -> bytes:
        return b"<"

    def with_warnings(self, pieces: list[bytes]) -> list[bytes]:
        return pieces

    def delta(self, index: int, delta: Delta) -> list[bytes]:
        return [delta.text.encode()]

    async def before_end(self, usage: Usage) -> None:
        """There is nothing to do."""

    def closing(self, usage: Usage) -> bytes:
        return b"> %d" % usage.completion_tokens


class Source:
    """What a generation's sequences come from: nowhere."""

    cached_tokens = (0,)

    def abandon(self) -> None:
        """There is nothing to end."""


class Wire:
    """Both ways to one client: what was sent by the task, and what was written beside it."""

    def __init__(self) -> None:
        self.takes_parts = True
        self.body: list[tuple[str, bytes]] = []

    async def send(self, message: dict[str, object]) -> None:
        if message["type"] == "http.response.body":
            self.body.append(("sent", cast(bytes, message["body"])))

    def write_part(self, body: bytes) -> None:
        self.body.append(("written", body))


async def forever() -> dict[str, object]:
    return cast("dict[str, object]", await asyncio.get_running_loop().create_future())


async def test_a_stream_is_written_as_it_comes_and_sent_where_its_connection_is_behind_or_it_ends() -> None:
    box, wire, ended = Mailbox(), Wire(), list[tuple[int, Delta | None]]()
    request = GenerationRequest(Origin("x"), [Prompt([1])], max_tokens=9, sampling=SamplingParams())
    generation = MailboxGeneration(request, box, Source(), Running())
    generation.on_end(lambda tokens, failure: ended.append((tokens, failure)))
    drawn: list[int] = []
    stream = EventStream(
        cast(Generation, generation),
        cast(Frames, Pieces()),
        OffLoop().of("a"),
        drawn=lambda tokens: drawn.extend(tokens),
    )
    running = asyncio.create_task(stream({"type": "http", EXCHANGE: wire}, forever, wire.send))  # type: ignore[arg-type]
    for number, (text, behind) in enumerate((("a", False), ("b", False), ("", False), ("c", True), ("d", False))):
        wire.takes_parts = not behind
        await turns()
        box.put(0, Delta(text, [number]))
        await turns()
    box.put(0, Delta("e", [5], FinishReason.LENGTH))
    await running
    assert wire.body == [
        *(("sent", b"<a"), ("written", b"b"), ("sent", b"c"), ("written", b"d"), ("sent", b"e"), ("sent", b"> 6")),
    ]
    assert (drawn, ended) == ([0, 1, 2, 3, 4, 5], [(6, None)])
