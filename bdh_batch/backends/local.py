"""Answers from a model in this process: tokenizer + engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence as Many
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from bdh_batch.errors import BDHError, ContextLengthExceeded, InvalidRequest
from bdh_batch.messages import Delta, GenerationRequest, Text
from bdh_batch.scheduler.mailbox import Mailbox
from bdh_batch.scheduler.sequence import Sequence
from bdh_batch.scheduler.worker import Load, shutting_down
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import TokenIdsOnly, Tokenizer, decode

T = TypeVar("T")

LONG = 16384  # characters; what is shorter is tokenized in a few milliseconds, and waits for no thread
LAST_WORDS_SECONDS = 2.0  # for the error events of a drain that ran out of time to reach their clients


class Engine(Protocol):
    """Who computes sequences: `scheduler.worker.Worker`, which says what these mean."""

    def submit(self, sequences: Many[Sequence], queue_timeout: float | None, timeout: float | None) -> None: ...

    def abort(self, sequences: Many[Sequence]) -> None: ...

    def fail_all(self, error: BDHError) -> None: ...

    def health(self, stall_seconds: float) -> str | None: ...

    def close(self) -> None: ...

    @property
    def load(self) -> Load: ...


class LocalGeneration:
    def __init__(self, sequences: Many[Sequence], mailbox: Mailbox, backend: LocalBackend) -> None:
        self._sequences = sequences
        self._mailbox = mailbox
        self._backend = backend
        self._open = len(sequences)

    @property
    def prompts(self) -> Many[Many[int]]:
        return [sequence.prompt for sequence in self._sequences]

    @property
    def cached_tokens(self) -> Many[int]:
        return [sequence.cached for sequence in self._sequences]

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        while self._open:
            deltas = await self._mailbox.take()
            self._open -= sum([delta.finish_reason is not None for _, delta in deltas])
            yield deltas

    def abort(self) -> None:
        self._backend.abandon(self)

    @property
    def sequences(self) -> Many[Sequence]:
        return self._sequences


class LocalBackend:
    """
    Args:
        vocab_size: token ids below it are valid in a prompt.
        max_model_len: most tokens of a prompt and its answer together; None is no limit.
        stall_seconds: how long a step may take before the engine counts as hung.
        queue_timeout, timeout: seconds that a request may wait, and take in all; None is no limit.
        eos: tokens with which the model ends its text.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        vocab_size: int,
        max_model_len: int | None,
        stall_seconds: float,
        queue_timeout: float | None = None,
        timeout: float | None = None,
        eos: frozenset[int] = frozenset(),
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._eos = eos
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._stall_seconds = stall_seconds
        self._queue_timeout = queue_timeout
        self._timeout = timeout
        self._running: set[LocalGeneration] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def tokenized(self, requests: Many[GenerationRequest]) -> list[GenerationRequest]:
        # A prompt that several share is tokenized once.
        known: dict[int, GenerationRequest] = {}
        for request in requests:
            if id(request.prompt) not in known:
                known[id(request.prompt)] = await self._with_tokens(request)
        done = [known[id(request.prompt)] for request in requests]
        return [replace(request, prompt=one.prompt, breaks=one.breaks) for request, one in zip(requests, done)]

    def generate(self, requests: Many[GenerationRequest]) -> LocalGeneration:
        mailbox = Mailbox()
        sequences = [self._sequence(request, index, mailbox) for index, request in enumerate(requests)]
        timeouts = [seconds for seconds in (self._timeout, requests[0].timeout) if seconds is not None]
        self._engine.submit(sequences, self._queue_timeout, min(timeouts, default=None))
        generation = LocalGeneration(sequences, mailbox, self)
        self._running.add(generation)
        self._idle.clear()
        return generation

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def abandon(self, generation: LocalGeneration) -> None:
        """No one reads `generation` any more, finished or not."""
        if generation not in self._running:
            return
        self._running.remove(generation)
        if any(sequence.finish_reason is None for sequence in generation.sequences):
            self._engine.abort(generation.sequences)
        if not self._running:
            self._idle.set()

    async def tokenize(self, prompt: Text, param: str) -> Many[int]:
        tokens, _ = await self._encode(prompt, param)
        return tokens

    async def detokenize(self, tokens: Many[int]) -> str:
        self._check(tokens, "tokens")
        if isinstance(self._tokenizer, TokenIdsOnly):
            raise InvalidRequest("This model has no tokenizer.", "tokens")
        text, _ = await self._off_the_loop(len(tokens), decode, self._tokenizer, tokens)
        return text

    def load(self) -> int:
        return len(self._running)

    def health(self) -> str | None:
        return self._engine.health(self._stall_seconds)

    async def drain(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self._engine.fail_all(shutting_down())
            await asyncio.wait([asyncio.ensure_future(self._idle.wait())], timeout=LAST_WORDS_SECONDS)

    def close(self) -> None:
        self._engine.close()

    def _sequence(self, request: GenerationRequest, index: int, mailbox: Mailbox) -> Sequence:
        prompt = request.tokens
        for token, _ in request.sampling.logit_bias:
            self._check([token], f"logit_bias.{token}")
        return Sequence(
            id=request.id,
            prompt=prompt,
            max_tokens=self._max_tokens(request, len(prompt)),
            sampling=None if request.pool else request.sampling,
            text=TextStream(
                self._tokenizer.decoder(), request.stop, request.include_stop, request.min_tokens, request.stop_before
            ),
            outbox=mailbox,
            index=index,
            n=request.n,
            min_tokens=request.min_tokens,
            stop_token_ids=self._stop_tokens(request),
            show_stop_token=request.include_stop,
            score_prompt=request.score_prompt,
            pool=request.pool,
            breaks=request.breaks,
            constraint=None if request.grammar is None else request.grammar.constraint(_early(request)),
            key=request.key,
            tenant=request.tenant,
            weight=request.weight,
            priority=request.priority,
            span=request.span,
        )

    def _stop_tokens(self, request: GenerationRequest) -> frozenset[int]:
        for place, token in enumerate(request.stop_token_ids):
            self._check([token], f"stop_token_ids[{place}]")
        stops = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else self._eos)
        if request.min_tokens and len(stops) >= self._vocab_size:
            text = "stop_token_ids has every token there is: with min_tokens nothing could be said."
            raise InvalidRequest(text, "stop_token_ids")
        return stops

    async def _with_tokens(self, request: GenerationRequest) -> GenerationRequest:
        param, tokens, breaks = request.prompt_param, request.prompt, request.breaks
        if isinstance(tokens, Text):
            tokens, breaks = await self._encode(tokens, param)
        else:
            self._check(tokens, param)
        if not tokens:
            raise InvalidRequest(f"{param}: Input should not be empty.", param)
        return replace(request, prompt=tokens, breaks=breaks)

    async def _encode(self, prompt: Text, param: str) -> tuple[Many[int], tuple[int, ...]]:
        try:
            return await self._off_the_loop(len(prompt.text), self._tokenizer.encode_prompt, prompt)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param) from error

    def _check(self, tokens: Many[int], param: str) -> None:
        if tokens and not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
            raise InvalidRequest(f"{param}: Token ids run from 0 to {self._vocab_size - 1}.", param)

    @staticmethod
    async def _off_the_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
        """In a thread, where it would hold up everyone else."""
        return await asyncio.to_thread(work, *arguments) if size > LONG else work(*arguments)

    def _max_tokens(self, request: GenerationRequest, prompt: int) -> int:
        """How many tokens an answer to a prompt of so many may have."""
        if self._max_model_len is None:
            return request.max_tokens
        room = self._max_model_len - prompt
        if room < min(1, request.max_tokens):
            room_for = "leave no room for an answer within" if request.max_tokens else "exceed"
            text = f"{prompt} prompt tokens {room_for} this server's {self._max_model_len}."
            raise ContextLengthExceeded(text, request.prompt_param)
        if request.max_tokens_param is not None and request.max_tokens > room:
            text = f"{prompt} prompt tokens and {request.max_tokens} to generate exceed {self._max_model_len}."
            raise ContextLengthExceeded(text, request.max_tokens_param)
        if request.min_tokens > room:
            text = f"{prompt} prompt tokens and {request.min_tokens} to generate exceed {self._max_model_len}."
            raise ContextLengthExceeded(text, "min_tokens")
        return min(request.max_tokens, room)


def _early(request: GenerationRequest) -> float:
    """Tokens before which an answer that can go on does."""
    return math.inf if request.ignore_eos else request.min_tokens
