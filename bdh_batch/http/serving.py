"""What requests are served with, over whatever protocol they come: one path from a checked body to its generation."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from bdh_batch.backends.base import Generation, TextBackend
from bdh_batch.errors import BDHError, QueueFull, TooLate
from bdh_batch.http.auth.access import Admission
from bdh_batch.http.auth.caller import Caller
from bdh_batch.http.auth.keys import KeyRing
from bdh_batch.http.auth.quota import Quota
from bdh_batch.http.auth.rates import Rates
from bdh_batch.http.gate import Gate, ServedModel
from bdh_batch.http.prepare import Preparation
from bdh_batch.http.request.body import Body, check, parse, read_object
from bdh_batch.http.request.client import Client, unless_left
from bdh_batch.http.request.off_loop import Aside, OffLoop
from bdh_batch.http.responses.frames import Frames, ResponseOptions
from bdh_batch.http.responses.generation import EventStream, whole
from bdh_batch.http.responses_api.shared_events import SharedEvents
from bdh_batch.http.schema.requests import GenerationBody
from bdh_batch.http.states.header import problem_of
from bdh_batch.http.watch.feed import Feed
from bdh_batch.messages import Delta, GenerationRequest
from bdh_batch.observability.metrics import Metrics
from bdh_batch.settings import Settings
from bdh_batch.store.byte_cache import open_byte_cache
from bdh_batch.store.opening import open_store
from bdh_batch.store.recent import Completion, Recent
from bdh_batch.store.records import Store
from bdh_batch.store.response_cache import ResponseCache, key_of

if TYPE_CHECKING:
    from bdh_batch.observability.spans import Spans

CACHE_HEADER = "x-cache"
SOONEST = 0.001  # seconds that a request has at least, once its model is loaded
UNDECISIVE = {"model", "stream", "stream_options", "priority"}  # fields that a response's tokens do not depend on


@dataclass(frozen=True)
class Serving:
    """What all protocols of one server share.

    Args:
        records: what clients have stored.
        recent: completions whose states can be saved.
        events: of responses in the background.
        spans: where they are exported.
        responses: those that are kept.
        feed: what operators watch.
        closing: what ends with the server.
    """

    settings: Settings
    gate: Gate
    metrics: Metrics
    admission: Admission
    quota: Quota
    records: Store
    recent: Recent
    events: SharedEvents
    spans: Spans | None = None
    responses: ResponseCache | None = None
    feed: Feed = field(default_factory=Feed)
    off_loop: OffLoop = field(default_factory=OffLoop)
    closing: list[Callable[[], Awaitable[None]]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        settings: Settings,
        gate: Gate,
        metrics: Metrics,
        keys: KeyRing | None = None,
        spans: Spans | None = None,
        recent: Recent | None = None,
        events: SharedEvents | None = None,
    ) -> Serving:
        """Without `keys`, none is asked for; without `recent` and `events`, nothing is shared with other processes.

        Raises:
            ConfigError: what the rates are counted in, or responses are kept or stored in, cannot be used.
        """
        rates = Rates(settings.rate_limiting, metrics)
        quota = Quota(rates, settings.limits.max_prompt_tokens, settings.scheduler.top_priority)
        chosen, responses = settings.response_cache, None
        if chosen.enabled:
            responses = ResponseCache(open_byte_cache(chosen), chosen.max_entry_bytes)
            metrics.watch_response_cache(lambda: responses.held)
        records = open_store(settings.store)
        metrics.watch_store(records)
        recent, events = recent or Recent(settings.store.recent_requests), events or SharedEvents()
        return cls(settings, gate, metrics, Admission(keys, rates), quota, records, recent, events, spans, responses)

    def aside(self, client: Client) -> Aside:
        """Where what takes long is done for a client, whose body has been read."""
        return self.off_loop.of(client.caller.label, client)

    def parse(self, raw: bytes, kind: type[Body]) -> Body:
        """The bytes of a body in its type. Raises InvalidRequest."""
        return parse(raw, kind, self.settings.limits, self.settings.api.unknown_fields)

    def parse_for_model(self, raw: bytes, kind: type[Body], caller: Caller) -> Body:
        """As `parse`, of a body that an upstream of the same API may be given as it came."""
        values = read_object(raw, self.settings.limits)
        name = values.get("model")
        passed_on = self.gate.passed_on(caller, name if isinstance(name, str) else None)
        return check(values, kind, self.settings.limits, self.settings.api.unknown_fields, passed_on)

    def check(self, values: dict[str, Any], kind: type[Body], passed_on: Collection[str] | None = None) -> Body:
        """The values of a body in its type. Raises InvalidRequest.

        Args:
            passed_on: see `Context`.
        """
        return check(values, kind, self.settings.limits, self.settings.api.unknown_fields, passed_on)

    async def model(self, client: Client, name: str | None) -> ServedModel:
        """The model of that name, which is loaded if it is not, and stays so until the request has ended.

        Raises:
            ModelNotFound
            Forbidden: the caller's key is not for it.
            QueueFull, QueueTimeout, Unavailable: it is not loaded.
            ClientDisconnect
        """
        hosted = self.gate.find(client.caller, name)
        client.account.model = hosted.info.name
        while (model := hosted.acquire()) is None:
            began, given = time.monotonic(), client.timeout
            await unless_left(client, hosted.load(given))
            if given is not None:
                client.given_timeout = max(SOONEST, given - (time.monotonic() - began))
        client.cleanup.callback(hosted.release)
        return model

    def preparation(self, client: Client, model: ServedModel, size: int) -> Preparation:
        """What makes the request of a body of `size` bytes complete."""
        most = self.settings.limits.max_values
        return Preparation(client, model, size, self.aside(client), self.records, most)

    async def start(
        self,
        client: Client,
        model: ServedModel,
        prepared: GenerationRequest,
        body: GenerationBody | None = None,
        size: int = 0,
    ) -> Generation:
        """Starts what was prepared, within the client's limits. Raises as `Quota.check` and `Quota.start` do.

        Args:
            body: that it was prepared of, of `size` bytes; None is one whose response is never kept.
        """
        if prepared.grammar is not None:
            self.metrics.left_out(model.name, prepared.grammar.warnings)
        self.quota.check(client, prepared)
        if self.responses is None or body is None or not is_determined(body, prepared):
            generation = await self._begun(client, model, prepared)
        else:
            key = await self.aside(client).run(size, response_key, client, model, prepared, body)
            generation = await self._replayed_or_kept(self.responses, key, client, model, prepared)
        if client.span is not None:
            generation.on_end(client.span.generation_ended)
        generation.on_end(partial(client.account.generated, generation))
        generation.on_end(partial(self._used, client.caller.label, generation))
        return generation

    def _used(self, tenant: str, generation: Generation, tokens: int, _: Delta | None) -> None:
        usage = generation.usage(tokens)
        self.metrics.usage.add(tenant, usage.prompt_tokens, usage.completion_tokens)

    async def _begun(self, client: Client, model: ServedModel, prepared: GenerationRequest) -> Generation:
        generation, state = await self.quota.start(client, model.backend, prepared), prepared.state

        def ended(tokens: int, failure: Delta | None) -> None:
            """A state of which nothing came may have a damaged file."""
            if state is not None and failure is None and min(generation.cached_tokens) < state.tokens:
                self.records.examine(state.path, problem_of)

        if model.layout is not None:
            generation.on_end(ended)
        return generation

    async def respond(
        self,
        client: Client,
        model: ServedModel,
        body: GenerationBody,
        size: int,
        prepared: GenerationRequest,
        frames: Frames,
    ) -> Response:
        """The response to a body of `size` bytes, whole or as a stream. Raises as `start` and `whole` do."""
        if prepared.grammar is not None:
            frames.warn(prepared.grammar.warnings)
        generation = await self.start(client, model, prepared, body, size)
        aside, drawn = self.aside(client), partial(self._remember, client, model, prepared)
        if body.stream:
            keepalive = self.settings.server.sse_keepalive_seconds
            return EventStream(generation, frames, aside, body.options.chunk_tokens or 1, keepalive, drawn)
        return await whole(generation, frames, client, aside, drawn)

    def _remember(self, client: Client, model: ServedModel, prepared: GenerationRequest, drawn: Sequence[int]) -> None:
        if not isinstance(model.backend, TextBackend):
            tokens = prepared.prompts[0].tokens
            if prepared.latent is not None and prepared.latent.count:
                tokens = [*tokens, *prepared.latent.tokens]
            known = Completion(model.name, prepared.salt, tokens, drawn)
            self.recent.add(client.caller.owner, client.id, known)

    async def _replayed_or_kept(
        self, responses: ResponseCache, key: str, client: Client, model: ServedModel, prepared: GenerationRequest
    ) -> Generation:
        counted = partial(self.metrics.response_cache, model.name)
        generation = await responses.find(key, prepared, counted)
        found = "miss" if generation is None else "hit"
        if generation is None:
            started = await self._begun(client, model, prepared)
            generation = responses.recorded(key, started, counted)
        client.standing[CACHE_HEADER] = found

        def ended(tokens: int, failure: Delta | None) -> None:
            if failure is not None:  # an error is neither, where nothing has been sent yet
                client.standing.pop(CACHE_HEADER, None)

        generation.on_end(ended)
        return generation

    def on_close(self, close: Callable[[], Awaitable[None]]) -> None:
        """Registers what ends with the server, before its storage does."""
        self.closing.append(close)

    async def close(self) -> None:
        """Ends what goes on beside requests, and closes connections to storage. Idempotent."""
        for close in self.closing:
            await close()
        if self.responses is not None:
            await self.responses.close()
        await self.records.close()

    def count_refusal(self, error: BDHError, client: Client | None) -> None:
        """Has the metrics count what was refused for want of room in a queue."""
        if isinstance(error, QueueFull):
            reason = "deadline" if isinstance(error, TooLate) else "queue_full"
            self.metrics.refused(reason, None if client is None else client.account.model)


def is_determined(body: GenerationBody, prepared: GenerationRequest) -> bool:
    """Whether the same request gets the same response: by its seed, or because the likeliest token is always taken."""
    if (written := prepared.written) is not None:  # by what the upstream gets of it
        return "seed" in written.fields or written.fields.get("temperature") == 0
    return body.seed is not None or (prepared.sampling is not None and prepared.sampling.temperature == 0)


def response_key(client: Client, model: ServedModel, prepared: GenerationRequest, body: GenerationBody) -> str:
    """The key under which the response to a body is kept."""
    fields = {name: value for name, value in body.written.items() if name not in UNDECISIVE}
    headers = {} if prepared.written is None else prepared.written.headers
    return key_of(client.caller.label, model.revision, type(body).__name__, fields, headers)


def response_options(id: str, body: GenerationBody, model: ServedModel) -> ResponseOptions:
    """What a body asks of its response."""
    options = ResponseOptions(
        id=id,
        created=int(time.time()),
        model=body.model or model.name,
        fingerprint=model.system_fingerprint,
        n=body.n or 1,
        tries=body.tries,
        token_ids=bool(body.return_token_ids),
        logprobs=body.top,
        names_are_ids=bool(body.return_tokens_as_token_ids),
        prompt_logprobs=body.prompt_logprobs,
        special=body.skip_special_tokens is False,
        echo=body.echoes,
        said=body.said,
        include_usage=bool(body.options.include_usage),
        continuous_usage=bool(body.options.include_usage and body.options.continuous_usage_stats),
        neurons=body.neurons is not None,
    )
    # What an upstream adds of these is in its own response.
    added: dict[str, Any] = {"token_ids": False, "logprobs": None, "prompt_logprobs": None, "echo": False, "said": ""}
    return replace(options, **added) if isinstance(model.backend, TextBackend) else options
