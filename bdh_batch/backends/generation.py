"""Generations that read the deltas of one request from its mailbox."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Protocol

from bdh_batch.backends.base import Ended
from bdh_batch.engine.mailbox import Mailbox
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Taker, Usage

FAILED = (FinishReason.ABORT, FinishReason.ERROR)
SLICE = 128  # sequences that are made at a time


async def breathe(made: int) -> None:
    """Between slices of what is made for one request, other work runs on the event loop."""
    if made and made % SLICE == 0:
        await asyncio.sleep(0)


class Source(Protocol):
    """What computes the sequences of a generation and fills its mailbox."""

    @property
    def cached_tokens(self) -> Sequence[int]:
        """How many tokens of each sequence's prompt were taken from a cached prefix."""

    def abandon(self) -> None:
        """Ends the sequences that still run, as nobody reads their deltas any more. Idempotent."""


class Tally:
    """What a generation has yielded so far, in ends and tokens, and who is told when it ends.

    Args:
        ends: how many it has: of its sequences, and of what becomes of a state that is saved.
    """

    def __init__(self, ends: int) -> None:
        self.open = ends  # those that are still to come
        self.tokens = 0
        self._failure: Delta | None = None
        self._ended: list[Ended] = []

    def add(self, deltas: Sequence[tuple[int, Delta]]) -> None:
        """Counts what is yielded."""
        for _, delta in deltas:
            self.tokens += len(delta.tokens)
            self.open -= delta.ends
            if delta.finish_reason in FAILED and self._failure is None:
                self._failure = delta

    def on_end(self, ended: Ended) -> None:
        self._ended.append(ended)

    def end(self) -> None:
        """Tells everyone, once; sequences that are open were aborted."""
        if self.open and self._failure is None:
            self._failure = Delta(finish_reason=FinishReason.ABORT)
        ended, self._ended = self._ended, []
        for each in ended:
            each(self.tokens, self._failure)


class MailboxGeneration:
    """Reads the deltas of one request's sequences from their mailbox.

    Args:
        source: what fills the mailbox.
        running: where the generation is registered until it is aborted.
    """

    def __init__(self, request: GenerationRequest, mailbox: Mailbox, source: Source, running: Running) -> None:
        self._request = request
        self._mailbox = mailbox
        self._source = source
        self._tally = Tally(len(request.prompts) * request.n + (request.save_to is not None))
        self._running = running
        running.add(self)

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        return [prompt.tokens for prompt in self._request.prompts for _ in range(self._request.n)]

    @property
    def cached_tokens(self) -> Sequence[int]:
        return self._source.cached_tokens

    def usage(self, completion_tokens: int) -> Usage:
        """A prompt counts once, however many choices it has, and as cached what its first choice was spared. Latent
        steps count with what each choice generated."""
        request = self._request
        of_prompts = zip(self.cached_tokens[:: request.n], request.prompts)
        cached, thought = sum(min(each, len(of.tokens)) for each, of in of_prompts), request.reasoning_tokens
        return Usage(request.prompt_tokens, completion_tokens + (thought or 0), cached, reasoning_tokens=thought)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        while self._tally.open:
            deltas = await self._mailbox.take()
            self._tally.add(deltas)
            yield deltas

    def offer_to(self, taker: Taker) -> None:
        """As `DirectGeneration` has it. Ends are always yielded, and so is all of a request whose state is saved."""
        if self._request.save_to is None:
            self._mailbox.offer_to(partial(self._offer, taker))

    def _offer(self, taker: Taker, deltas: Sequence[tuple[int, Delta]]) -> bool:
        tokens = 0
        for _, delta in deltas:
            if delta.finish_reason is not None:
                return False
            tokens += len(delta.tokens)
        taken = taker(deltas)
        if taken:
            self._tally.tokens += tokens
        return taken

    def abort(self) -> None:
        self._mailbox.offer_to(None)
        self._source.abandon()
        self._running.discard(self)
        self._tally.end()

    def on_end(self, ended: Ended) -> None:
        self._tally.on_end(ended)


class Running:
    """The generations that were started and are still read; a drain waits until none is left."""

    def __init__(self) -> None:
        self._under_way: set[object] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._under_way)

    def __iter__(self) -> Iterator[object]:
        return iter([*self._under_way])

    def add(self, generation: object) -> None:
        self._under_way.add(generation)
        self._idle.clear()

    def discard(self, generation: object) -> None:
        self._under_way.discard(generation)
        if not self._under_way:
            self._idle.set()

    async def wait_until_idle(self, seconds: float) -> bool:
        """Returns whether all generations have ended within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
