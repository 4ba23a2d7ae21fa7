"""A model in the caller's own program, on the event loop that it is used on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Self, TypeVar

from bdh_batch.errors import InvalidRequest
from bdh_batch.llm import asks, results
from bdh_batch.llm.choosing import chosen, in_process
from bdh_batch.llm.outputs import (
    CompletionOutput,
    EmbeddingRequestOutput,
    Message,
    NeuronsRequestOutput,
    Prompt,
    RequestOutput,
    ScoringRequestOutput,
    State,
)
from bdh_batch.llm.params import SamplingParams, spread
from bdh_batch.llm.progress import UseTqdm, progress
from bdh_batch.llm.prompts import Pair, Plain, conversations, is_one, listed, pairs, plain
from bdh_batch.llm.requests import Ask, Ended, Requests, Stream, closed, encoded
from bdh_batch.llm.states import File, States, id_of
from bdh_batch.llm.window import Job, window_for
from bdh_batch.messages import Text
from bdh_batch.processes.components import GENERATION_CONFIG, suggested_generation
from bdh_batch.processes.in_process import InProcess
from bdh_batch.processes.model_settings import ModelSettings, chosen_model
from bdh_batch.settings import Settings
from bdh_batch.text.chat import ChatTemplate
from bdh_batch.text.tokenizer import Tokenizer

T = TypeVar("T")

Params = SamplingParams | Sequence[SamplingParams] | None
Begin = State | str | Sequence[State | str | None] | None
Priority = int | Sequence[int] | None


class AsyncLLM:
    """Computes a model in this program, with asyncio. The verbs are those of `LLM`, to be awaited.

    The model is loaded by `start`, by `async with`, or by the first verb, on the running event loop, which it belongs
    to from then on.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        config: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        """As `LLM`. Raises ConfigError, CheckpointError."""
        self._begin(chosen(model, config, settings))

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """That of a server's settings. Raises ConfigError, CheckpointError: there is no such model."""
        made = cls.__new__(cls)
        made._begin(in_process(settings))
        return made

    def _begin(self, model: ModelSettings) -> None:
        self._model = model
        self._window = window_for(self._model.settings.scheduler)
        self._opening: asyncio.Task[InProcess] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # that the model was loaded on
        self._requests: Requests | None = None
        self._closed = False

    async def start(self) -> None:
        """Loads the model. Idempotent. Raises ConfigError, CheckpointError; Unavailable: it has been closed;
        RuntimeError: it is another event loop's."""
        if self._closed:
            raise closed()
        self._check_loop()
        if self._opening is None or (self._opening.done() and self._opening.cancelled()):
            self._loop = asyncio.get_running_loop()
            self._opening = asyncio.create_task(InProcess.open(self._model, self._model.settings))
        host = await asyncio.shield(self._opening)
        if self._requests is None:
            self._requests = Requests(host)

    async def close(self) -> None:
        """Ends what runs with an error, and frees the model. Idempotent. Raises RuntimeError: it is another event
        loop's."""
        self._check_loop()
        self._closed = True
        if self._opening is not None:
            opened = await asyncio.gather(self._opening, return_exceptions=True)
            if isinstance(opened[0], InProcess):
                await opened[0].close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def model_name(self) -> str:
        return self._model.name

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of a prompt and its completion together; None is no limit."""
        return self._model.settings.model.max_model_len

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where no `sampling_params` are given: vLLM's defaults, but for what the settings or the model's
        folder say. Raises ConfigError, CheckpointError."""
        return replace(self._default)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template of its own; else conversations are lines of `role: content`. False
        before it has been loaded."""
        template = None if self._requests is None else self._requests.host.served.template
        return isinstance(template, ChatTemplate) and not template.is_built_in

    async def check(self, sampling_params: SamplingParams) -> None:
        """Raises InvalidRequest where a completion could not have these."""
        requests = await self._ready()
        [ask] = asks.completions([("", "?")], asks.Parameters(sampling_params, self._default, 1), [None], {})
        body = requests.serving.parse(ask.raw, ask.kind)
        body.check(requests.host.served.defaults)
        body.latent(requests.host.served.defaults)
        body.source()

    async def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return (await self._ready()).host.served.backend.tokenizer

    async def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: UseTqdm = True,
        priority: Priority = None,
        state: Begin = None,
    ) -> list[RequestOutput]:
        """Completes prompts. As `LLM.generate`."""
        requests, (given, _) = await self._ready(), listed(prompts, "prompts")
        parameters = asks.Parameters(sampling_params, self._default, len(given))
        extra = {"priority": spread(priority, len(given), "priority", int)}
        asked = asks.completions(given, parameters, _states(state, len(given)), extra)
        return await self._completed(requests, asked, len(given), use_tqdm)

    async def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: UseTqdm = True,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        priority: Priority = None,
        state: Begin = None,
    ) -> list[RequestOutput]:
        """Continues conversations. As `LLM.chat`."""
        requests, given = await self._ready(), conversations(messages)
        others = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "chat_template_kwargs": chat_template_kwargs,
        }
        parameters = asks.Parameters(sampling_params, self._default, len(given), chat=True, others=others)
        extra = {"priority": spread(priority, len(given), "priority", int)}
        asked = asks.chats(given, parameters, _states(state, len(given)), extra)
        return await self._completed(requests, asked, len(given), use_tqdm)

    async def stream(
        self,
        prompt: Prompt | Iterable[Message],
        sampling_params: SamplingParams | None = None,
        *,
        state: State | str | None = None,
    ) -> AsyncIterator[CompletionOutput]:
        """Yields a completion piece by piece. As `LLM.stream`."""
        stream = await self.open_stream(prompt, sampling_params, state)
        try:
            async for piece in self.pieces(stream):
                yield piece
        finally:
            stream.close()

    async def open_stream(
        self, prompt: Prompt | Iterable[Message], sampling_params: SamplingParams | None, state: State | str | None
    ) -> Stream:
        """Starts a stream, which has to be closed, and waits while there are too many."""
        requests, others = await self._ready(), {"stream": True}
        ask: Ask[Any]
        if is_one(prompt):
            parameters = asks.Parameters(sampling_params, self._default, 1, others=others)
            [ask] = asks.completions([("prompt", plain(prompt, "prompt"))], parameters, _states(state, 1), {})
        else:
            parameters = asks.Parameters(sampling_params, self._default, 1, chat=True, others=others)
            [ask] = asks.chats([("messages", conversations(prompt)[0][1])], parameters, _states(state, 1), {})
        await self._window.take(ask.sequences)
        try:
            stream = await self._window.admitted(ask.sequences, partial(requests.stream, ask))
        except BaseException:
            self._window.give_back(ask.sequences)
            raise
        stream.started.client.cleanup.callback(self._window.give_back, ask.sequences)
        return stream

    async def pieces(self, stream: Stream) -> AsyncIterator[CompletionOutput]:
        """What a stream brings."""
        tokenizer, request = await self.get_tokenizer(), stream.started.request
        async for deltas in stream:
            for index, delta in deltas:
                yield results.completion(index, delta, request, tokenizer)

    async def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        use_tqdm: UseTqdm = True,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Makes vectors of prompts. As `LLM.embed`."""
        requests, (given, _) = await self._ready(), listed(prompts, "prompts")
        others = {"dimensions": dimensions, "truncate_prompt_tokens": truncate_prompt_tokens}

        async def work(ask: Ask[Any]) -> EmbeddingRequestOutput:
            return results.embedding(await requests.whole(ask), dimensions)

        jobs = (Job(1, partial(work, ask)) for ask in asks.embeddings(given, others))
        with progress(use_tqdm, len(given)) as done:
            return await self._window.all(jobs, done)

    async def score(
        self,
        prompts: Prompt | Iterable[Prompt | tuple[Prompt, Prompt]],
        continuations: Prompt | Iterable[Prompt] | None = None,
        *,
        use_tqdm: UseTqdm = True,
    ) -> list[ScoringRequestOutput]:
        """Says how likely texts are. As `LLM.score`."""
        requests, given = await self._ready(), pairs(prompts, continuations)
        jobs = (Job(1, partial(self._score, requests, pair)) for pair in given)
        with progress(use_tqdm, len(given)) as done:
            return await self._window.all(jobs, done)

    async def neurons(
        self, prompts: Prompt | Iterable[Prompt], top: int = 16, *, use_tqdm: UseTqdm = True
    ) -> list[NeuronsRequestOutput]:
        """Shows which neurons the tokens of prompts fire. As `LLM.neurons`."""
        requests, (given, _) = await self._ready(), listed(prompts, "prompts")
        tokenizer = await self.get_tokenizer()

        async def work(name: str, prompt: Plain) -> NeuronsRequestOutput:
            return results.neurons(await requests.whole(asks.neurons(name, prompt, top)), tokenizer)

        jobs = (Job(1, partial(work, *each)) for each in given)
        with progress(use_tqdm, len(given)) as done:
            return await self._window.all(jobs, done)

    async def save_state(
        self, of: Prompt | RequestOutput, *, metadata: Mapping[str, str] | None = None, ttl: float | None = None
    ) -> State:
        """Saves the state after a prompt, or after what was generated. As `LLM.save_state`."""
        return await (await self._states()).save(of, metadata, ttl)

    async def fork_state(
        self, state: State | str, *, metadata: Mapping[str, str] | None = None, ttl: float | None = None
    ) -> State:
        """Makes a new state that is the same. As `LLM.fork_state`."""
        return await (await self._states()).fork(state, metadata, ttl)

    async def list_states(self) -> list[State]:
        """The saved states, the newest first."""
        return await (await self._states()).list()

    async def delete_state(self, state: State | str) -> None:
        """Deletes a state. What has begun in it goes on."""
        await (await self._states()).delete(state)

    async def export_state(self, state: State | str, path: File) -> None:
        """Writes a state to a file. As `LLM.export_state`."""
        await (await self._states()).export(state, path)

    async def import_state(
        self, path: File, *, metadata: Mapping[str, str] | None = None, ttl: float | None = None
    ) -> State:
        """Stores the state in a file. As `LLM.import_state`."""
        return await (await self._states()).load(path, metadata, ttl)

    async def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text. Raises InvalidRequest: there is no tokenizer, or it is no text."""
        if not isinstance(text, str):
            raise InvalidRequest("text: Input should be a text.", "text")
        encoded({"text": text})  # refuses half of a surrogate pair, as every other prompt does
        backend = (await self._ready()).host.served.backend
        return [*await backend.tokenize(Text(text, add_special_tokens), "text")]

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens. Raises InvalidRequest: there is no tokenizer, or a token is not the model's."""
        given = plain(tokens, "tokens")
        if isinstance(given, str):
            raise InvalidRequest("tokens: Input should be a list of token ids.", "tokens")
        return await (await self._ready()).host.served.backend.detokenize(given)

    def _check_loop(self) -> None:
        """The engine wakes the loop that it was started on, and no other: who waited on one would wait forever."""
        if self._loop not in (None, asyncio.get_running_loop()):
            raise RuntimeError(
                "This AsyncLLM belongs to the event loop that loaded it, and this is another one, as of a second "
                "asyncio.run. Make an AsyncLLM on each, or use LLM, which needs none."
            )

    async def _ready(self) -> Requests:
        await self.start()
        assert self._requests is not None
        return self._requests

    async def _states(self) -> States:
        return States(await self._ready())

    @cached_property
    def _default(self) -> SamplingParams:
        with contextlib.closing(chosen_model(self._model.settings)) as located:
            folder = located.path if located.path.is_dir() else located.path.parent
            said = suggested_generation(folder / GENERATION_CONFIG)
        return SamplingParams(**said | self._model.settings.generation.model_dump(exclude_none=True))

    async def _completed(
        self, requests: Requests, asked: Iterable[Ask[Any]], count: int, use_tqdm: UseTqdm
    ) -> list[RequestOutput]:
        tokenizer = await self.get_tokenizer()

        async def work(ask: Ask[Any]) -> RequestOutput:
            ended: Ended = await requests.whole(ask)
            return results.request_output(ended, tokenizer)

        jobs = (Job(ask.sequences, partial(work, ask)) for ask in asked)
        with progress(use_tqdm, count) as done:
            return await self._window.all(jobs, done)

    async def _score(self, requests: Requests, pair: Pair) -> ScoringRequestOutput:
        name, before, name_after, after = pair
        known = await self._tokens(name, before, True) if before else self._prefix(requests, name)
        tokens, begin = await self._joined(name_after, before, known, after)
        ended = await requests.whole(asks.scored(name_after, tokens))
        return results.score(ended, begin)

    async def _joined(self, name: str, before: Plain, known: list[int], after: Plain) -> tuple[list[int], int]:
        """The tokens of a prompt with its continuation, and where that begins: of two texts, those of the whole, if
        they begin with the prompt's."""
        if isinstance(before, str) and isinstance(after, str) and before:
            whole = await self._tokens(name, before + after, True)
            if whole[: len(known)] == known and len(whole) > len(known):
                return whole, len(known)
        rest = await self._tokens(name, after, False)
        return [*known, *rest], len(known)

    async def _tokens(self, name: str, given: Plain, special: bool) -> list[int]:
        """Raises InvalidRequest: there are none, or they are not the model's."""
        backend = (await self._ready()).host.served.backend
        raw = Text(given, special) if isinstance(given, str) else given
        [prompt] = await backend.tokenized([(name, raw)])
        return [*prompt.tokens]

    @staticmethod
    def _prefix(requests: Requests, name: str) -> list[int]:
        """What texts begin with that come after nothing. Raises InvalidRequest: the tokenizer has no such token."""
        token = requests.host.served.tokenizer_info.get("prefix_token_id")
        if not isinstance(token, int):
            text = f"{name}: Input should not be empty: this model's tokenizer has no token that texts begin with."
            raise InvalidRequest(text, name)
        return [token]


def _states(given: Begin, count: int) -> list[State | str | None]:
    """The state that each of `count` prompts begins in. Raises InvalidRequest."""
    if given is None or isinstance(given, State | str):
        return [given] * count
    if not isinstance(given, list | tuple):
        id_of(given)
    found: list[State | str | None] = spread(given, count, "state", (State, str, type(None)))
    return found
