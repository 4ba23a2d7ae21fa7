"""Generates with a model in this process: tokenizer + engine."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import AsyncIterator, Callable, Sequence as Many
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from bdh_batch.backends.base import Ended, Unread
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.mailbox import Mailbox
from bdh_batch.engine.worker import Load, shutting_down
from bdh_batch.errors import BDHError, ContextLengthExceeded, InvalidRequest
from bdh_batch.messages import NO_TOKENS, Adjustment, Delta, FinishReason, GenerationRequest, Prompt, Text, distinct
from bdh_batch.scheduler.sequence import Client, Prefix, Sequence
from bdh_batch.text.restrictions import Restriction, sequences_of
from bdh_batch.text.stop_strings import StopStrings
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import TokenIdsOnly, Tokenizer, decode

T = TypeVar("T")

LONG = 16384  # characters; what is shorter is tokenized in a few milliseconds, and waits for no thread
NODE_COST = 4  # of a character of a bad word, beside one that is tokenized
PART = 65536  # tokens that are checked at a time
SLICE = 128  # sequences that are made at a time
LAST_WORDS_SECONDS = 2.0  # for the error events of a drain that ran out of time to reach their clients


class Engine(Protocol):
    """What computes sequences: `engine.worker.Worker`, which says what these mean."""

    def submit(self, sequences: Many[Sequence], queue_timeout: float | None, timeout: float | None) -> None: ...

    def abort(self, sequences: Many[Sequence]) -> None: ...

    def fail_all(self, error: BDHError) -> None: ...

    def health(self, stall_seconds: float) -> str | None: ...

    def close(self) -> None: ...

    @property
    def load(self) -> Load: ...


@dataclass(frozen=True, slots=True)
class Shared:
    """What the sequences of one client's request have in common: checked and made once."""

    stop: StopStrings
    stop_token_ids: frozenset[int]
    banned: array[int]  # those of them that cannot be drawn before `min_tokens`
    restriction: Restriction | None


FAILED = (FinishReason.ABORT, FinishReason.ERROR)


class LocalGeneration:
    """The sequences of one client's request, read from their mailbox."""

    def __init__(self, sequences: Many[Sequence], mailbox: Mailbox, backend: LocalBackend) -> None:
        self._sequences = sequences
        self._mailbox = mailbox
        self._backend = backend
        self._open = len(sequences)
        self._tokens = 0
        self._failure: Delta | None = None
        self._ended: list[Ended] = []

    @property
    def prompts(self) -> Many[Many[int]]:
        return [sequence.prompt for sequence in self._sequences]

    @property
    def cached_tokens(self) -> Many[int]:
        return [sequence.prefix.cached for sequence in self._sequences]

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        while self._open:
            deltas = await self._mailbox.take()
            for _, delta in deltas:
                self._tokens += len(delta.tokens)
                if delta.finish_reason is not None:
                    self._open -= 1
                    if delta.finish_reason in FAILED and self._failure is None:
                        self._failure = delta
            yield deltas

    def abort(self) -> None:
        self._backend.abandon(self)
        if self._open and self._failure is None:
            self._failure = Delta(finish_reason=FinishReason.ABORT)
        ended, self._ended = self._ended, []
        for each in ended:
            each(self._tokens, self._failure)

    def on_end(self, ended: Ended) -> None:
        self._ended.append(ended)

    @property
    def sequences(self) -> Many[Sequence]:
        return self._sequences


class LocalBackend:
    """Generates with an engine and a tokenizer in this process.

    Args:
        vocab_size: token ids below it are valid in a prompt.
        max_model_len: most tokens of a prompt and its completion together; None is no limit.
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

    async def tokenized(self, prompts: Many[Unread], last: int | None = None) -> list[Prompt]:
        size = sum(len(prompt.text if isinstance(prompt, Text) else prompt) for _, prompt in prompts)
        return await self._off_the_loop(size, lambda: [self._prompt(*each, last) for each in prompts])

    async def generate(self, request: GenerationRequest) -> LocalGeneration:
        mailbox, shared = Mailbox(), await self._shared(request)
        sequences: list[Sequence] = []
        for prompt in request.prompts:
            sampling, room = request.sampling, self._max_tokens(request, prompt)
            first = (
                None if sampling is None else Adjustment.of(sampling, prompt.tokens, shared.banned, request.min_tokens)
            )
            for choice in range(request.n):
                await breathe(len(sequences))
                adjustment = first if first is None or choice == 0 else first.afresh()
                sequences.append(self._sequence(request, prompt, room, len(sequences), mailbox, shared, adjustment))
            if len(prompt.tokens) > LONG:
                await asyncio.sleep(0)
        timeouts = [seconds for seconds in (self._timeout, request.origin.timeout) if seconds is not None]
        self._engine.submit(sequences, self._queue_timeout, min(timeouts, default=None))
        generation = LocalGeneration(sequences, mailbox, self)
        self._running.add(generation)
        self._idle.clear()
        return generation

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def abandon(self, generation: LocalGeneration) -> None:
        """Ends `generation`, which is read no more, finished or not."""
        if generation not in self._running:
            return
        self._running.remove(generation)
        if any(sequence.finish_reason is None for sequence in generation.sequences):
            self._engine.abort(generation.sequences)
        if not self._running:
            self._idle.set()

    async def tokenize(self, prompt: Text, param: str) -> Many[int]:
        tokens, _ = await self._off_the_loop(len(prompt.text), self._encode, prompt, param)
        return tokens

    async def detokenize(self, tokens: Many[int]) -> str:
        await self._off_the_loop(len(tokens), self._check, tokens, "tokens")
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

    async def _shared(self, request: GenerationRequest) -> Shared:
        """Raises InvalidRequest where a token is not the model's, or nothing could be said."""
        bias = None if request.sampling is None else request.sampling.logit_bias
        if bias is not None and not self._knows(bias.tokens):
            token = next(token for token in bias.tokens if not self._knows([token]))
            self._check([token], f"logit_bias.{token}")
        if not self._knows(request.stop_token_ids):
            at = next(at for at, token in enumerate(request.stop_token_ids) if not self._knows([token]))
            self._check([request.stop_token_ids[at]], f"stop_token_ids[{at}]")
        stops = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else self._eos)
        if request.min_tokens and len(stops) >= self._vocab_size:
            text = "stop_token_ids has every token there is: with min_tokens nothing could be said."
            raise InvalidRequest(text, "stop_token_ids")
        size = NODE_COST * sum(map(len, request.bad_words)) + len(request.allowed_token_ids or ()) // 4
        restriction = await self._off_the_loop(size, self._restriction, request, stops)
        banned = distinct(stops) if request.min_tokens else NO_TOKENS
        return Shared(StopStrings(request.stop), stops, banned, restriction)

    def _restriction(self, request: GenerationRequest, stops: frozenset[int]) -> Restriction | None:
        """Raises InvalidRequest where a token is not the model's, or nothing could be said."""
        allowed = request.allowed_token_ids
        if allowed is None and not request.bad_words:
            return None
        if allowed is not None:
            if not self._knows(allowed):
                at = next(at for at, token in enumerate(allowed) if not self._knows([token]))
                self._check([allowed[at]], f"allowed_token_ids[{at}]")
            if request.min_tokens and stops.issuperset(allowed):
                text = (
                    "allowed_token_ids has only tokens that end the completion: with min_tokens nothing could be said."
                )
                raise InvalidRequest(text, "allowed_token_ids")
        try:
            banned = [each for word in request.bad_words for each in sequences_of(word, self._tokenizer)]
        except InvalidRequest as error:
            raise InvalidRequest(error.message, "bad_words") from error
        restriction = Restriction(self._vocab_size, allowed, banned)
        if not restriction.allows_any:
            raise InvalidRequest("bad_words leaves no token that the completion could begin with.", "bad_words")
        return restriction

    def _sequence(
        self,
        request: GenerationRequest,
        prompt: Prompt,
        max_tokens: int,
        index: int,
        mailbox: Mailbox,
        shared: Shared,
        adjustment: Adjustment | None,
    ) -> Sequence:
        decoder = self._tokenizer.decoder(special=request.show_special)
        constraint = None if request.grammar is None else request.grammar.constraint(_early(request))
        if shared.restriction is not None:
            constraint = shared.restriction.constraint(constraint)
        sampling, origin = request.sampling, request.origin
        completion = Completion(
            prompt=prompt.tokens,
            max_tokens=max_tokens,
            sampling=None if sampling is None else replace(sampling, seed=request.seeds[index]),
            text=TextStream(decoder, shared.stop, request.include_stop, request.min_tokens, request.stop_before),
            min_tokens=request.min_tokens,
            stop_token_ids=shared.stop_token_ids,
            show_stop_token=request.include_stop,
            score_prompt=request.score_prompt,
            pool=sampling is None,
            constraint=constraint,
            adjustment=adjustment,
            id=origin.id,
        )
        return Sequence(
            id=origin.id,
            completion=completion,
            client=Client(mailbox, index, request.n, origin.span),
            prefix=Prefix(origin.cache_namespace, request.salt, prompt.breaks),
            tenant=origin.tenant,
            weight=origin.weight,
            priority=request.priority,
        )

    def _prompt(self, param: str, prompt: Text | Many[int], last: int | None) -> Prompt:
        tokens: Text | Many[int] = prompt
        breaks: tuple[int, ...] = ()
        if isinstance(tokens, Text):
            tokens, breaks = self._encode(tokens, param)
        else:
            self._check(tokens, param)
        if not tokens:
            raise InvalidRequest(f"{param}: Input should not be empty.", param)
        if last is None or (begin := len(tokens) - last) <= 0:
            return Prompt(tokens, param, breaks)
        return Prompt(tokens[begin:], param, tuple(at - begin for at in breaks if at > begin))

    def _encode(self, prompt: Text, param: str) -> tuple[Many[int], tuple[int, ...]]:
        try:
            return self._tokenizer.encode_prompt(prompt)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param) from error

    def _check(self, tokens: Many[int], param: str) -> None:
        if not self._knows(tokens):
            raise InvalidRequest(f"{param}: Token ids run from 0 to {self._vocab_size - 1}.", param)

    def _knows(self, tokens: Many[int]) -> bool:
        """Whether all are tokens of the model. In parts, as `min` does not let go of the interpreter."""
        parts = (tokens[at : at + PART] for at in range(0, len(tokens), PART))
        return all(0 <= min(part) <= max(part) < self._vocab_size for part in parts)

    @staticmethod
    async def _off_the_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
        """In a thread, where it would hold up everyone else."""
        return await asyncio.to_thread(work, *arguments) if size > LONG else work(*arguments)

    def _max_tokens(self, request: GenerationRequest, of: Prompt) -> int:
        """How many tokens the completion of a prompt may have."""
        if self._max_model_len is None:
            return request.max_tokens
        prompt = len(of.tokens)
        room = self._max_model_len - prompt
        if room < min(1, request.max_tokens):
            room_for = "leave no room for a completion within" if request.max_tokens else "exceed"
            text = f"{prompt} prompt tokens {room_for} this server's {self._max_model_len}."
            raise ContextLengthExceeded(text, of.param)
        if request.max_tokens_param is not None and request.max_tokens > room:
            text = f"{prompt} prompt tokens and {request.max_tokens} to generate exceed {self._max_model_len}."
            raise ContextLengthExceeded(text, request.max_tokens_param)
        if request.min_tokens > room:
            text = f"{prompt} prompt tokens and {request.min_tokens} to generate exceed {self._max_model_len}."
            raise ContextLengthExceeded(text, "min_tokens")
        return min(request.max_tokens, room)


async def breathe(made: int) -> None:
    """Between slices of what is made for one request, other work runs on the event loop."""
    if made and made % SLICE == 0:
        await asyncio.sleep(0)


def _early(request: GenerationRequest) -> float:
    """Tokens before which a completion that can go on does."""
    return math.inf if request.ignore_eos else request.min_tokens
