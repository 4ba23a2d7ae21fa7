"""A backend that has an upstream generate: every choice of a request is a request to one of its endpoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from bdh_batch.backends.base import Ended, RawPrompt
from bdh_batch.backends.generation import Running, Tally, breathe
from bdh_batch.backends.tokenization import Tokenization, off_the_loop
from bdh_batch.errors import (
    GenerationFailed,
    InvalidRequest,
    QueueFull,
    RunTimeout,
    Unavailable,
    UnsupportedParameter,
)
from bdh_batch.messages import Delta, FinishReason, GenerationRequest, Prompt, Text, Usage, Written
from bdh_batch.text.job_queue import JobQueue, QueueLimits
from bdh_batch.text.stop_strings import StopStrings
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import NoText, TokenIdsOnly, Tokenizer
from bdh_batch.upstreams.choice import Choice, Outbox, Route
from bdh_batch.upstreams.counting import conversation_size, encoded_length, estimate
from bdh_batch.upstreams.endpoints import Endpoints
from bdh_batch.upstreams.fields import passed_on
from bdh_batch.upstreams.protocol import MOST, TextRequest

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 2.0  # for the error events of a drain that ran out of time to reach their clients
LARGEST_SEED = 2**63 - 1  # that all protocols can express
MOST_WAITING = 8192  # requests that wait for their turn at one upstream


class UpstreamBackend:
    """Generates with the endpoints of one upstream. Implements `Backend` and `TextBackend`.

    Args:
        tokenizer: of the upstream's model, to count tokens with; None estimates what the upstream does not report.
        timeout: seconds that a request may take in all; None is no limit.
    """

    def __init__(self, route: Route, tokenizer: Tokenizer | None, timeout: float | None) -> None:
        self._route = route
        self._counts = tokenizer
        self._tokenization = Tokenization(tokenizer or TokenIdsOnly(), MOST)
        self._timeout = timeout
        self._running = Running()
        upstream = route.upstream
        self._turns = JobQueue(QueueLimits(upstream.max_requests, MOST_WAITING, 2**40, upstream.first_token_seconds))

    def start(self) -> None:
        """Begins the health checks. To be called on the event loop."""
        self._route.endpoints.start()

    @property
    def endpoints(self) -> Endpoints:
        return self._route.endpoints

    @property
    def takes_messages(self) -> bool:
        return self._route.connector.takes_messages

    @property
    def pass_headers(self) -> Sequence[str]:
        return self._route.upstream.pass_headers

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenization.tokenizer

    async def accept(self, written: Written, param: str) -> tuple[Written, list[Prompt]]:
        upstream, connector = self._route.upstream, self._route.connector
        chat = param == "messages"
        best_of = written.fields.get("best_of")
        if best_of is not None and best_of > written.fields.get("n", 1):
            raise UnsupportedParameter("best_of is not supported by the upstream of this model.", "best_of")
        defaults = {name: value for name, value in upstream.defaults.items() if not _says(written.fields, name)}
        expressed, drop = connector.expresses(chat, self._route.endpoints.ours), upstream.drop
        asked = {**defaults, **written.fields}
        if chat and written.messages is None and expressed is not None and "add_special_tokens" not in expressed:
            asked.pop("add_special_tokens", None)  # it is about the template's prompt, which is all that can be given
        fields = passed_on(upstream.id, asked, expressed, drop, not connector.stops)
        for name, value in written.headers.items():
            if not (value.isascii() and value.isprintable()):
                raise InvalidRequest(f"The header {name} should be printable ASCII: it is passed on.", name)
        return replace(written, fields=fields), await self._counted(written, param)

    async def generate(self, request: GenerationRequest) -> UpstreamGeneration:
        if request.written is None:
            raise InvalidRequest("This model is an upstream's, which only generates texts.", "model")
        if (problem := self.ready()) is not None:
            raise Unavailable(f"Not now: {problem}.", self._route.endpoints.retry_after)
        generation = UpstreamGeneration(self._route, request, self._counts, self._timeout, self._turns, self._running)
        try:
            await generation.start()
        except BaseException:
            generation.abort()
            raise
        return generation

    async def tokenized(self, prompts: Sequence[RawPrompt], last: int | None = None) -> list[Prompt]:
        raise InvalidRequest("This model is an upstream's, which only generates texts.", "model")

    async def tokenize(self, prompt: Text, param: str) -> Sequence[int]:
        return await self._tokenization.tokenize(prompt, param)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return await self._tokenization.detokenize(tokens)

    def load(self) -> int:
        return len(self._running)

    def health(self) -> str | None:
        return None

    def ready(self) -> str | None:
        return self._route.endpoints.ready()

    async def drain(self, seconds: float) -> None:
        if not await self._running.wait_until_idle(seconds):
            for generation in self._running:
                assert isinstance(generation, UpstreamGeneration)
                generation.fail(Unavailable("The server is shutting down.", retry_after=5))
            await self._running.wait_until_idle(LAST_WORDS_SECONDS)
        await self._route.endpoints.close()
        await self._route.connector.close()

    def close(self) -> None:
        """Nothing is left to be released after `drain`."""

    async def _counted(self, written: Written, param: str) -> list[Prompt]:
        """Returns the prompts as so many tokens as they have, or are estimated to have."""
        if written.messages is not None:
            size = await off_the_loop(len(written.messages) * 64, conversation_size, written.messages)
            return [Prompt(range(estimate(size)), param)]
        return [Prompt(await self._tokens_of(prompt), param) for prompt in written.prompts]

    async def _tokens_of(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            self._tokenization.check(prompt, "prompt")
            return prompt
        if self._counts is None:
            return range(estimate(len(prompt.encode())))
        return range(await off_the_loop(len(prompt), encoded_length, self._counts, prompt, True))


def _says(fields: Any, name: str) -> bool:
    return name in fields or (name == "max_tokens" and "max_completion_tokens" in fields)


class UpstreamGeneration:
    """A request that an upstream generates. Implements `Generation`."""

    def __init__(
        self,
        route: Route,
        request: GenerationRequest,
        counts: Tokenizer | None,
        timeout: float | None,
        turns: JobQueue,
        running: Running,
    ) -> None:
        assert request.written is not None
        self._route = route
        self._request = request
        self._is_exact = counts is not None and request.written.messages is None
        self._turns = turns
        self._timeout = request.origin.timeout_within(timeout)
        self._running = running
        self._outbox = Outbox()
        self._tally = Tally(len(request.prompts) * request.n)
        self._tokenizer = counts
        self._choices: list[Choice] = []
        self._tasks: list[asyncio.Task[None]] = []
        running.add(self)

    async def start(self) -> None:
        """Starts the choices; between slices of them, other work runs on the event loop."""
        request, route = self._request, self._route
        assert request.written is not None
        stops = StopStrings(() if route.connector.stops else request.stop)
        for index, each in enumerate(_requests(request, request.written)):
            await breathe(index)
            text = TextStream(NoText(), stops, request.include_stop)
            seed = request.seeds[index] & LARGEST_SEED
            choice = Choice(index, each, route, self._outbox, text, seed, self._tokenizer)
            self._choices.append(choice)
            self._tasks.append(self._start(choice))

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        return [prompt.tokens for prompt in self._request.prompts for _ in range(self._request.n)]

    @property
    def cached_tokens(self) -> Sequence[int]:
        return [choice.cached_tokens for choice in self._choices]

    def usage(self, completion_tokens: int) -> Usage:
        prompt_tokens, estimated = 0, False
        for number, prompt in enumerate(self._request.prompts):
            first = self._choices[number * self._request.n]
            if first.prompt_tokens is not None and not (first.prompt_estimated and self._is_exact):
                prompt_tokens += first.prompt_tokens
                estimated = estimated or first.prompt_estimated
            else:
                prompt_tokens += len(prompt.tokens)
                estimated = estimated or not (self._is_exact or not isinstance(prompt.tokens, range))
        cached = sum(self.cached_tokens[:: self._request.n])
        estimated = estimated or any(choice.count.estimated for choice in self._choices)
        if all(choice.ended for choice in self._choices):
            completion_tokens = sum(choice.count.tokens for choice in self._choices)
        return Usage(min(prompt_tokens, MOST), min(completion_tokens, MOST), min(cached, MOST), estimated)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        while self._tally.open:
            deltas = await self._outbox.take()
            self._tally.add(deltas)
            yield deltas

    def abort(self) -> None:
        self._cancel()
        for choice in self._choices:
            choice.abort()  # its reader may wait for the next delta
        self._running.discard(self)
        self._tally.end()

    def on_end(self, ended: Ended) -> None:
        self._tally.on_end(ended)

    def fail(self, error: Unavailable) -> None:
        """Ends all choices with an error, as the server is shutting down."""
        self._cancel()
        for choice in self._choices:
            choice.fail(error)

    def _cancel(self) -> None:
        """Cancels the tasks, each once: a second time would end what the first has them do, to close connections."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()

    async def _run(self, choice: Choice) -> None:
        """Runs a choice when its turn has come, within the request's time."""
        tenant, upstream, index = self._request.origin.tenant, self._route.upstream.id, choice.index
        try:
            async with asyncio.timeout(self._timeout):
                try:
                    await self._turns.take(tenant, 0)
                except QueueFull:
                    text = f"Too many requests wait for the upstream {upstream!r} (upstreams.max_requests)."
                    choice.fail(QueueFull(text, self._route.endpoints.retry_after))
                    return
                try:
                    await choice.run()
                finally:
                    self._turns.give_back(tenant)
        except TimeoutError:
            choice.fail(RunTimeout(f"The request took longer than its {self._timeout:g} s."))
        finally:
            tokens = choice.prompt_tokens or len(self._request.prompts[index // self._request.n].tokens)
            outcome = choice.outcome or FinishReason.ABORT
            self._route.observer.ended(upstream, outcome, tokens, choice.count.tokens)

    def _start(self, choice: Choice) -> asyncio.Task[None]:
        task = asyncio.create_task(self._run(choice))

        def done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (fault := task.exception()) is not None:
                log.error("a request to the upstream %s failed", self._route.upstream.id, exc_info=fault)
                choice.fail(GenerationFailed("Internal server error. The server's log has the reason."))

        task.add_done_callback(done)
        return task


def _requests(request: GenerationRequest, written: Written) -> Iterator[TextRequest]:
    """Yields the request for each choice."""
    prompts: Sequence[str | Sequence[int] | None] = written.prompts if written.messages is None else [None]
    several = len(prompts) * request.n > 1
    for number, prompt in enumerate(prompts):
        for choice in range(request.n):
            fields = written.fields
            if choice and "seed" in fields:
                fields = {**fields, "seed": fields["seed"] + choice}
            id = f"{request.origin.id}-{number * request.n + choice}" if several else request.origin.id
            yield TextRequest(id, prompt, written.messages, fields, written.headers)
