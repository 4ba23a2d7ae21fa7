"""A backend that generates with an engine and a tokenizer in this process."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from bdh_batch.backends.base import RawPrompt
from bdh_batch.backends.generation import MailboxGeneration, Running, breathe
from bdh_batch.backends.tokenization import LONG, Tokenization, off_the_loop
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.mailbox import Deliveries, Mailbox
from bdh_batch.engine.worker import Load, shutting_down
from bdh_batch.errors import BDHError, ContextLengthExceeded, InvalidRequest
from bdh_batch.messages import (
    NO_TOKENS,
    GenerationRequest,
    LogitsProcessors,
    NeuronLimit,
    Progress,
    Prompt,
    SavedState,
    Text,
    distinct,
)
from bdh_batch.messages.state import INVALID, Warmed
from bdh_batch.scheduler.sequence import Client, Outbox, Prefix, Sequence
from bdh_batch.scheduler.watched import WatchedSequence
from bdh_batch.text.restrictions import Restriction, sequences_of
from bdh_batch.text.stop_strings import StopStrings
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import Tokenizer

NODE_COST = 4  # of a character of a bad word, beside one that is tokenized
NO_LIMIT = NeuronLimit(layers=1, most=2**62)
LAST_WORDS_SECONDS = 2.0  # for the error events of a drain that ran out of time to reach their clients


class Engine(Protocol):
    """The part of `engine.worker.Worker` that a backend uses to have sequences computed."""

    def submit(
        self, sequences: Many[Sequence], queue_timeout: float | None, timeout: float | None, resumed: bool
    ) -> None: ...

    def abort(self, sequences: Many[Sequence]) -> None: ...

    def fail_all(self, error: BDHError) -> None: ...

    def warm(self, state: SavedState, tokens: bytes, prefix: Prefix) -> Future[Warmed]: ...

    def health(self, stall_seconds: float) -> str | None: ...

    def close(self) -> None: ...

    @property
    def load(self) -> Load: ...


@dataclass(frozen=True, slots=True)
class Shared:
    """What all sequences of one request share; it is checked and made once."""

    stop: StopStrings
    stop_token_ids: frozenset[int]
    banned: array[int]  # those of them that cannot be drawn before `min_tokens`
    restriction: Restriction | None


class Submission:
    """The sequences of one request that were submitted to an engine: the source of a generation."""

    def __init__(self, sequences: Many[Sequence], engine: Engine) -> None:
        self._sequences = sequences
        self._engine = engine

    @property
    def sequences(self) -> Many[Sequence]:
        return self._sequences

    @property
    def cached_tokens(self) -> Many[int]:
        return [sequence.prefix.cached for sequence in self._sequences]

    def abandon(self) -> None:
        if any(sequence.finish_reason is None for sequence in self._sequences):
            self._engine.abort(self._sequences)


class LocalBackend:
    """Generates with an engine and a tokenizer in this process.

    Args:
        vocab_size: token ids below it are valid in a prompt.
        max_model_len: most tokens of a prompt and its completion together; None is no limit.
        stall_seconds: how long a step may take before the engine counts as hung.
        queue_timeout, timeout: seconds that a request may wait, and take in all; None is no limit.
        eos: tokens with which the model ends its text.
        latent: whether it has latent steps.
        neurons: how many a response may contain.
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
        latent: bool = False,
        neurons: NeuronLimit = NO_LIMIT,
    ) -> None:
        self._engine = engine
        self._tokenization = Tokenization(tokenizer, vocab_size)
        self._eos = eos
        self._has_latent_steps = latent
        self._neurons = neurons
        self._max_model_len = max_model_len
        self._stall_seconds = stall_seconds
        self._queue_timeout = queue_timeout
        self._timeout = timeout
        self._running = Running()
        self._deliveries = Deliveries()

    async def generate(self, request: GenerationRequest) -> MailboxGeneration:
        mailbox = Mailbox(self._deliveries)
        submission = await self.submit(request, mailbox)
        return MailboxGeneration(request, mailbox, submission, self._running)

    async def submit(self, request: GenerationRequest, outbox: Outbox, progress: Many[Progress] = ()) -> Submission:
        """Starts all sequences of a request, or none. Their deltas go to `outbox`.

        Args:
            progress: how far another engine has computed each sequence; those that have ended are left out.

        Raises:
            InvalidRequest, QueueFull, Unavailable: as `generate`.
        """
        request = _checked_state(request)
        if request.neurons is not None:
            request.neurons.check(request.watched_tokens, self._neurons)
        shared = await self._shared(request)
        sequences: list[Sequence] = []
        for number, prompt in enumerate(request.prompts):
            first, room = self._processors(request, prompt, shared), self._max_tokens(request, prompt)
            prompt = self._with_latent_steps(request, prompt)
            for index in range(number * request.n, (number + 1) * request.n):
                await breathe(index)
                if progress and progress[index].ended:
                    continue
                processors = None if first is None else first.afresh()
                sequence = self._sequence(request, prompt, room, index, outbox, shared, processors)
                if progress and progress[index].tokens:
                    await off_the_loop(len(progress[index].tokens), sequence.resume, progress[index].tokens)
                sequences.append(sequence)
            if len(prompt.tokens) > LONG:
                await asyncio.sleep(0)
        queue_timeout = None if progress else self._queue_timeout
        self._engine.submit(sequences, queue_timeout, request.origin.timeout_within(self._timeout), bool(progress))
        return Submission(sequences, self._engine)

    async def warm(self, state: SavedState, tokens: bytes, cache_namespace: str, salt: str) -> Warmed:
        return await asyncio.wrap_future(self._engine.warm(state, tokens, Prefix(cache_namespace, salt)))

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenization.tokenizer

    async def tokenized(self, prompts: Many[RawPrompt], last: int | None = None) -> list[Prompt]:
        return await self._tokenization.prompts(prompts, last)

    async def tokenize(self, prompt: Text, param: str) -> Many[int]:
        return await self._tokenization.tokenize(prompt, param)

    async def detokenize(self, tokens: Many[int]) -> str:
        return await self._tokenization.detokenize(tokens)

    def load(self) -> int:
        return len(self._running)

    def health(self) -> str | None:
        return self._engine.health(self._stall_seconds)

    def ready(self) -> str | None:
        return self.health()

    async def drain(self, seconds: float) -> None:
        if not await self._running.wait_until_idle(seconds):
            self._engine.fail_all(shutting_down())
            await self._running.wait_until_idle(LAST_WORDS_SECONDS)

    def close(self) -> None:
        self._engine.close()

    async def _shared(self, request: GenerationRequest) -> Shared:
        """Raises InvalidRequest where a token is not the model's, or no token could be generated."""
        known = self._tokenization
        bias = None if request.sampling is None else request.sampling.logit_bias
        if bias is not None and not known.knows(bias.tokens):
            token = next(token for token in bias.tokens if not known.knows([token]))
            known.check([token], f"logit_bias.{token}")
        known.check_each(request.stop_token_ids, "stop_token_ids")
        stops = frozenset(request.stop_token_ids) | (frozenset() if request.ignore_eos else self._eos)
        if request.min_tokens and len(stops) >= known.vocab_size:
            text = "stop_token_ids contains every token of the model: with min_tokens no token could be generated."
            raise InvalidRequest(text, "stop_token_ids")
        size = NODE_COST * sum(map(len, request.bad_words)) + len(request.allowed_token_ids or ()) // 4
        restriction = await off_the_loop(size, self._restriction, request, stops)
        banned = distinct(stops) if request.min_tokens else NO_TOKENS
        return Shared(StopStrings(request.stop), stops, banned, restriction)

    def _restriction(self, request: GenerationRequest, stops: frozenset[int]) -> Restriction | None:
        """Raises InvalidRequest where a token is not the model's, or no token could be generated."""
        allowed = request.allowed_token_ids
        if allowed is None and not request.bad_words:
            return None
        if allowed is not None:
            self._tokenization.check_each(allowed, "allowed_token_ids")
            if request.min_tokens and stops.issuperset(allowed):
                text = (
                    "allowed_token_ids contains only tokens that end the completion: "
                    "with min_tokens no token could be generated."
                )
                raise InvalidRequest(text, "allowed_token_ids")
        try:
            banned = [each for word in request.bad_words for each in sequences_of(word, self.tokenizer)]
        except InvalidRequest as error:
            raise InvalidRequest(error.message, "bad_words") from error
        restriction = Restriction(self._tokenization.vocab_size, allowed, banned)
        if not restriction.allows_any:
            raise InvalidRequest("bad_words leaves no token that the completion could begin with.", "bad_words")
        return restriction

    def _with_latent_steps(self, request: GenerationRequest, prompt: Prompt) -> Prompt:
        """The prompt, and the request's latent steps after it. Where they begin, other numbers of steps do as well.

        Raises:
            InvalidRequest: it has latent steps, of an earlier turn, and the model has none.
        """
        if request.latent is not None and request.latent.count:
            begin, steps = len(prompt.tokens), request.latent.tokens
            latents = (*prompt.latents, *range(begin, begin + len(steps)))
            prompt = Prompt([*prompt.tokens, *steps], prompt.param, (*prompt.breaks, begin), latents)
        if prompt.latents and not (self._has_latent_steps and prompt.latents[0]):
            text = f"{prompt.param}: There are latent steps in what it goes on from, which this model does not have."
            raise InvalidRequest(text, prompt.param)
        return prompt

    @staticmethod
    def _processors(request: GenerationRequest, prompt: Prompt, shared: Shared) -> LogitsProcessors | None:
        """Returns the logits processors that the choices for one prompt begin with; None where they change nothing."""
        if request.sampling is None:
            return None
        return LogitsProcessors.of(request.sampling, prompt.tokens, shared.banned, request.min_tokens)

    def _sequence(
        self,
        request: GenerationRequest,
        prompt: Prompt,
        max_tokens: int,
        index: int,
        outbox: Outbox,
        shared: Shared,
        processors: LogitsProcessors | None,
    ) -> Sequence:
        decoder = self.tokenizer.decoder(special=request.show_special)
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
            prompt_logprobs=request.prompt_logprobs,
            pool=sampling is None,
            constraint=constraint,
            processors=processors,
            watches_prompt=request.neurons is not None and request.neurons.prompt,
            latent_steps=0 if request.latent is None else request.latent.count,
            id=origin.id,
        )
        kind = Sequence if request.neurons is None else partial(WatchedSequence, asked=request.neurons)
        return kind(
            id=origin.id,
            completion=completion,
            client=Client(outbox, index, request.n, origin.span),
            latents=prompt.latents,
            prefix=Prefix(origin.cache_namespace, request.salt, prompt.breaks),
            tenant=origin.tenant,
            weight=origin.weight,
            priority=request.priority,
            state=request.state,
            state_optional=request.state_optional,
            save_to=request.save_to if index == 0 else None,
        )

    def _max_tokens(self, request: GenerationRequest, of: Prompt) -> int:
        """Returns how many tokens the completion of a prompt may have."""
        if self._max_model_len is None:
            return request.max_tokens
        steps = 0 if request.latent is None else request.latent.count
        before = f"{len(of.tokens)} prompt tokens" + (f", {steps} latent steps" if steps else "")
        room = self._max_model_len - len(of.tokens) - steps
        if room < min(1, request.max_tokens):
            room_for = "leave no room for a completion within" if request.max_tokens else "exceed"
            raise ContextLengthExceeded(f"{before} {room_for} this server's {self._max_model_len}.", of.param)
        if request.max_tokens_param is not None and request.max_tokens > room:
            text = f"{before} and {request.max_tokens} to generate exceed {self._max_model_len}."
            raise ContextLengthExceeded(text, request.max_tokens_param)
        if request.min_tokens > room:
            text = f"{before} and {request.min_tokens} to generate exceed {self._max_model_len}."
            raise ContextLengthExceeded(text, "min_tokens")
        return min(request.max_tokens, room)


def _checked_state(request: GenerationRequest) -> GenerationRequest:
    """Returns the request, without its state where that is optional and of no use.

    Raises:
        InvalidRequest: its prompts cannot begin in its state.
    """
    if (state := request.state) is None:
        return request
    shortest = min(len(prompt.tokens) for prompt in request.prompts)
    watches = request.neurons is not None and request.neurons.prompt
    if request.sampling is None or watches or request.prompt_logprobs is not None:
        problem = "A response about the tokens of the prompt cannot begin in a state that has read them."
    elif not 0 < state.tokens < shortest:
        problem = (
            f"The state has read {state.tokens} tokens: the prompt, of {shortest}, has to begin with them and go on."
        )
    else:
        return request
    if request.state_optional:
        return replace(request, state=None)
    raise InvalidRequest(problem, "state", INVALID)


def _early(request: GenerationRequest) -> float:
    """Tokens before which a completion that can go on does."""
    return math.inf if request.ignore_eos else request.min_tokens
