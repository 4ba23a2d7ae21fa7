"""An upstream's backend in this process, and what one request to it becomes."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from bdh_batch.errors import BDHError
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Origin, SamplingParams, Usage, Written
from bdh_batch.upstreams.backend import UpstreamBackend, UpstreamGeneration
from bdh_batch.upstreams.config import AnyUpstream
from bdh_batch.upstreams.open import open_upstream

HANG_SECONDS = 120.0
KIND: TypeAdapter[Any] = TypeAdapter(AnyUpstream)


class Seen:
    """An observer that counts."""

    def __init__(self) -> None:
        self.failures: Counter[str] = Counter()
        self.moved: Counter[bool] = Counter()
        self.outcomes: Counter[str] = Counter()

    def answered(self, upstream: str, seconds: float) -> None:
        assert seconds >= 0

    def failed(self, upstream: str, kind: str) -> None:
        self.failures[kind] += 1

    def went_elsewhere(self, upstream: str, begun: bool) -> None:
        self.moved[begun] += 1

    def ended(self, upstream: str, outcome: str, prompt_tokens: int, completion_tokens: int) -> None:
        self.outcomes[outcome] += 1


@dataclass
class Response:
    """All that came of a request."""

    texts: list[str] = field(default_factory=list)
    reasons: list[FinishReason | None] = field(default_factory=list)
    error: BDHError | None = None
    extras: list[Any] = field(default_factory=list)
    usage: Usage = Usage(0, 0)  # noqa: RUF009
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        (text,) = self.texts
        return text


@dataclass
class Gateway:
    """One upstream, open."""

    backend: UpstreamBackend
    seen: Seen
    timeout: float | None = None

    async def start(
        self,
        prompt: str | Sequence[int] | None = "hi",
        messages: Sequence[dict[str, Any]] | None = None,
        headers: dict[str, str] | None = None,
        n: int = 1,
        tenant: str = "t",
        **fields: Any,
    ) -> UpstreamGeneration:
        prompts = [] if prompt is None or messages is not None else [prompt]
        written = Written(prompts, messages, {**fields, "n": n}, headers or {})
        written, counted = await self.backend.accept(written, "messages" if messages is not None else "prompt")
        request = GenerationRequest(
            Origin("r-1", tenant, timeout=self.timeout),
            counted,
            max_tokens=fields.get("max_tokens", 256),
            sampling=SamplingParams(),
            seeds=range(7, 7 + n),
            n=n,
            stop=tuple(fields.get("stop", ())),
            include_stop=bool(fields.get("include_stop_str_in_output")),
            written=written,
        )
        return await self.backend.generate(request)

    async def ask(self, *arguments: Any, **fields: Any) -> Response:
        async with asyncio.timeout(HANG_SECONDS):
            return await read(await self.start(*arguments, **fields))


async def leave(generation: UpstreamGeneration) -> None:
    """Reads one delta and leaves, as a client of HTTP does: who watches it aborts, and then the one who reads."""
    async for _ in generation:
        break
    generation.abort()
    await asyncio.sleep(0)
    generation.abort()


async def read(generation: UpstreamGeneration) -> Response:
    found = Response([""] * len(generation.prompts), [None] * len(generation.prompts))
    try:
        async for deltas in generation:
            for index, delta in deltas:
                _add(found, index, delta)
    finally:
        generation.abort()
    found.usage = generation.usage(0)
    return found


def _add(found: Response, index: int, delta: Delta) -> None:
    found.texts[index] += delta.text
    found.pieces.append(delta.text)
    found.reasons[index] = delta.finish_reason or found.reasons[index]
    found.error = delta.error or found.error
    found.extras += delta.extras or ()


@contextlib.asynccontextmanager
async def upstream(checked: bool = False, deadline: float | None = None, **options: Any) -> AsyncIterator[Gateway]:
    """An upstream with these options. `checked`: its endpoints have been looked at before it is asked."""
    seen = Seen()
    backend = open_upstream(KIND.validate_python({"id": "up", **options}), None, seen)
    if checked:
        for endpoint in backend.endpoints.all:
            await backend.endpoints.check(endpoint)
    try:
        yield Gateway(backend, seen, deadline)
    finally:
        await backend.drain(0)
