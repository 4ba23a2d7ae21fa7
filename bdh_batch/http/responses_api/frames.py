"""Responses in the shape of the Responses API: one object, or the events that it is put together from.

A stream is response.created, response.in_progress, the output items one after the other (output_item.added, what they
gain, output_item.done), and response.completed or response.incomplete; or, where it fails, an error and
response.failed. Behind all of them is [DONE].
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import orjson

from bdh_batch.errors import BDHError
from bdh_batch.http.errors import describe
from bdh_batch.http.request.off_loop import LARGE, Aside
from bdh_batch.http.responses.frames import DONE, Frames, ResponseOptions
from bdh_batch.http.responses.logprobs import listed
from bdh_batch.http.schema.other_names import Names
from bdh_batch.messages import Delta, FinishReason, Usage
from bdh_batch.text.calls import Said
from bdh_batch.text.parts import Parts, Uses
from bdh_batch.text.tokenizer import Tokenizer

READ, ENCODED = 16, 64  # characters in a microsecond: read for calls, and encoded several times
INCOMPLETE = {FinishReason.LENGTH: "max_output_tokens", FinishReason.CONTENT_FILTER: "content_filter"}
Response = dict[str, Any]
Keep = Callable[["ResponseFrames"], Awaitable[bool]]


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.total_tokens,
    } | ({"estimated": True} if usage.estimated else {})


@dataclass(slots=True)
class _Item:
    """An output item: a message, or with `call` that of a function."""

    id: str
    index: int
    call: Uses | None
    status: str = "in_progress"
    text: StringIO = field(default_factory=lambda: StringIO(newline=""))
    logprobs: list[bytes] = field(default_factory=list)

    def part(self) -> dict[str, Any]:
        """The content of a message."""
        logprobs = orjson.Fragment(b"[" + b",".join(self.logprobs) + b"]")
        return {"type": "output_text", "text": self.text.getvalue(), "annotations": [], "logprobs": logprobs}

    def json(self) -> dict[str, Any]:
        if self.call is not None:
            called = {"call_id": self.call.id, "name": self.call.name, "arguments": self.text.getvalue()}
            return {"type": "function_call", "id": self.id, "status": self.status, **called}
        content = [] if self.status == "in_progress" else [self.part()]
        return {"type": "message", "id": self.id, "status": self.status, "role": "assistant", "content": content}


class ResponseFrames(Frames):
    """Encodes one response.

    Args:
        response: what is known of it when it begins.
        names: of the fields that errors are about.
        tools: as in `Parts`.
        aside: where what takes long is encoded.
        size: bytes of the request.
        keep: stores it once it is complete; returns whether it is stored.
    """

    kind = chunk_kind = "response"
    before_text = after_text = b""

    def __init__(
        self,
        options: ResponseOptions,
        tokenizer: Tokenizer,
        response: Response,
        names: Names,
        tools: Sequence[str] | None,
        aside: Aside,
        size: int = 0,
        keep: Keep | None = None,
    ) -> None:
        super().__init__(options, tokenizer)
        self.only_text = tools is None and options.logprobs is None and size <= LARGE
        self.response = response
        self.text = StringIO(newline="")  # as it was generated, calls included
        self.tokens: list[int] = []
        self.end = Delta()
        self._names = names
        self._read = Parts(tools, "call")
        self._aside = aside
        self._size = size
        self._keep = keep
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._calls: dict[int, _Item] = {}
        self._most_calls: int | None = response.get("max_tool_calls")
        self.number = 0  # of the next event
        self.ending = b""  # the last events, once it has ended well
        self._logprob_bytes = 0
        self._held: list[bytes] = []  # log-probabilities whose text has not come yet

    @property
    def size(self) -> int:
        """About how many bytes the response has so far."""
        return self.text.tell() + 4 * len(self.tokens) + self._logprob_bytes

    def warn(self, warnings: Sequence[Mapping[str, str]]) -> None:
        if warnings:
            left_out = [{**each, "param": self._names.field(each["param"])} for each in warnings]
            self.response["warnings"] = left_out

    def with_warnings(self, pieces: list[bytes]) -> list[bytes]:
        return pieces  # they are in the first event

    def opening(self, prompts: Sequence[Sequence[int]]) -> bytes:
        return self._event("response.created", response=self.response) + self.begun()

    def begun(self) -> bytes:
        self.response["status"] = "in_progress"
        return self._event("response.in_progress", response=self.response)

    async def begin(self) -> bytes:
        """As `begun`, encoded aside where that takes long."""
        return await self._aside.run(self._size, self.begun)

    def queued(self) -> bytes:
        """The first events of a response in the background."""
        self.response["status"] = "queued"
        events = [self._event(f"response.{kind}", response=self.response) for kind in ("created", "queued")]
        return b"".join(events)

    def delta(self, index: int, delta: Delta) -> list[bytes]:
        self.text.write(delta.text)
        self.tokens += delta.tokens
        if delta.finish_reason is not None:
            self.end = delta
        if delta.logprobs and self._options.logprobs is not None:
            self._held.append(listed(self._name, delta.logprobs))
            self._logprob_bytes += len(self._held[-1])
        frames: list[bytes] = []
        for part in self._read.of(delta):
            if isinstance(part, Said):
                frames += self._say(part.text)
            elif isinstance(part, Uses):
                if self._most_calls is not None and len(self._calls) >= self._most_calls:
                    continue  # an upstream does not know how many there may be
                frames += self._begin_item(part)
                self._calls[part.index] = self._items[-1]
            elif (item := self._calls.get(part.index)) is not None:
                item.text.write(part.text)
                place = {"item_id": item.id, "output_index": item.index}
                frames.append(self._event("response.function_call_arguments.delta", **place, delta=part.text))
        return frames

    async def before_end(self, usage: Usage, ends: Sequence[Delta] = ()) -> None:
        cost = self.cost((), ends) + sum(len(end.text) // READ for end in ends)
        await self._aside.run(cost + self._ending_cost, self._finish, usage, ends)
        if self._keep is not None:
            self.response["store"] = await self._keep(self)
        if not ends:  # it is a stream
            self.ending = await self._aside.run(self._ending_cost, self._encode_ending)

    def closing(self, usage: Usage) -> bytes:
        return self.ending + DONE

    def cost(self, prompts: Sequence[Sequence[int]], deltas: Sequence[Delta]) -> int:
        return super().cost(prompts, deltas) + (self._size if prompts else 0)

    @property
    def _ending_cost(self) -> int:
        """About how many microseconds it takes to encode what ends the response, which has all of it."""
        return (self.text.tell() + self._logprob_bytes) // ENCODED

    def _encode_ending(self) -> bytes:
        return b"".join([*self._last, self._event(f"response.{self.response['status']}", response=self.response)])

    def whole(self, prompts: Sequence[Sequence[int]], usage: Usage, ends: Sequence[Delta]) -> list[bytes]:
        return [orjson.dumps(self.response)]

    def named(self, error: BDHError) -> BDHError:
        return self._names.of(error)

    def failed(self, error: BDHError) -> bytes:
        self.response["store"] = False  # only its end is stored, where it is not in the background
        return self.failure(error) + DONE

    def failure(self, error: BDHError) -> bytes:
        """The last events of one that fails."""
        self.fail(error)
        self.number += 1
        first = problem_event(self.number - 1, error)
        return first + self._event("response.failed", response=self.response)

    def fail(self, error: BDHError) -> None:
        """The response has failed."""
        status, body = describe(error)
        code = "rate_limit_exceeded" if status == 429 else "invalid_prompt" if status == 400 else "server_error"
        self.response |= {
            "status": "failed",
            "error": {"code": code, "message": body["error"]["message"]},
            "output": self._output(),
        }

    def cancel(self) -> None:
        """The response has been cancelled."""
        self.response |= {"status": "cancelled", "output": self._output()}

    def _output(self) -> list[dict[str, Any]]:
        """All items; one that is open is incomplete, and the others stay what they were when they ended."""
        if self._open is not None:
            self._open.status = "incomplete"
        return [item.json() for item in self._items]

    def _finish(self, usage: Usage, ends: Sequence[Delta]) -> None:
        for index, end in enumerate(ends):
            self.delta(index, end)
        reason = INCOMPLETE.get(self.end.finish_reason or FinishReason.STOP)
        status = "completed" if reason is None else "incomplete"
        self._last = [] if self._items else self._begin_item(None)
        self._last += self._close(status)
        self.response |= {
            "status": status,
            "completed_at": None if reason else int(time.time()),
            "incomplete_details": reason and {"reason": reason},
            "output": self._output(),
            "usage": usage_of(usage),
        }

    def _say(self, text: str) -> list[bytes]:
        frames = [] if self._open is not None and self._open.call is None else self._begin_item(None)
        assert self._open is not None
        logprobs, self._held = b",".join(self._held), []
        if logprobs:
            self._open.logprobs.append(logprobs)
        self._open.text.write(text)
        given = orjson.Fragment(b"[" + logprobs + b"]")
        return [*frames, self._event("response.output_text.delta", **self._place(), delta=text, logprobs=given)]

    def _begin_item(self, call: Uses | None) -> list[bytes]:
        """The item that was open ends, and a new one begins."""
        frames = self._close("completed")
        index = len(self._items)
        self._open = item = _Item(f"{'msg' if call is None else 'fc'}_{self._options.id[5:]}_{index}", index, call)
        self._items.append(item)
        self._held = self._held if call is None else []
        frames.append(self._event("response.output_item.added", output_index=index, item=item.json()))
        if call is None:
            frames.append(self._event("response.content_part.added", **self._place(), part=item.part()))
        return frames

    def _close(self, status: str) -> list[bytes]:
        if (item := self._open) is None:
            return []
        if item.call is None:
            place, part = self._place(), item.part()
            frames = [
                self._event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"]),
                self._event("response.content_part.done", **place, part=part),
            ]
        else:
            place = {"item_id": item.id, "output_index": item.index, "name": item.call.name}
            done = self._event("response.function_call_arguments.done", **place, arguments=item.text.getvalue())
            frames = [done]
        self._open, item.status = None, status
        frames.append(self._event("response.output_item.done", output_index=item.index, item=item.json()))
        return frames

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": self._open.index, "content_index": 0}

    def _event(self, kind: str, **members: Any) -> bytes:
        """The next server-sent event."""
        self.number += 1
        return _encoded(kind, self.number - 1, **members)


def _encoded(kind: str, number: int, **members: Any) -> bytes:
    data = orjson.dumps({"type": kind, "sequence_number": number, **members})
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def problem_event(number: int, error: BDHError) -> bytes:
    """The event that says what was wrong."""
    problem = describe(error)[1]["error"]
    flat = {name: problem[name] for name in ("code", "message", "param")}
    # OpenAI has the members of the error beside its type, Open Responses inside it: here they are in both places.
    return _encoded("error", number, **flat, error=problem)
