"""A model in the caller's own program, for programs without an event loop."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from bdh_batch.llm.async_llm import AsyncLLM, Begin, Params, Priority
from bdh_batch.llm.loop_thread import LoopThread
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
from bdh_batch.llm.params import SamplingParams
from bdh_batch.llm.progress import UseTqdm
from bdh_batch.llm.prompts import gathered
from bdh_batch.llm.requests import Stream
from bdh_batch.llm.states import File
from bdh_batch.settings import Settings
from bdh_batch.text.tokenizer import Tokenizer

OPEN: weakref.WeakSet[LLM] = weakref.WeakSet()  # closed at the program's end, if not before


class LLM:
    """Computes a model in this program, with the engine and the scheduler of the server. Names are vLLM's.

        with LLM("path/to/folder") as llm:
            [output] = llm.generate("ROMEO:", SamplingParams(max_tokens=100))
            print(output.outputs[0].text)

    Any thread may use it, several at once. Lists of any length are submitted bit by bit; the first prompt that fails
    ends the others. Ctrl-C ends what runs, and the model can be used again.

    Every verb raises the errors of `bdh_batch.errors`. `param` of an `InvalidRequest` names the argument at fault, as
    in `prompts[7]`, or the field of the sampling parameters.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        config: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        """Loads a model.

        Args:
            model: a model folder, a checkpoint file, or a name that `bdh-batch model list` shows; None is the bundled
                model.
            config: a YAML file of options, as of the server.
            settings: options of the section `model` by their own names, as `device="cpu"` or `max_model_len=4096`;
                sections of options, as `engine={"threads": 2}`; and, as vLLM has them, `max_num_seqs`,
                `max_num_batched_tokens`, `enable_prefix_caching`, `chat_template`.

        Raises:
            ConfigError, CheckpointError: it cannot be loaded.
        """
        self._load(AsyncLLM(model, config=config, **settings))

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Loads the model of a server's settings. Raises ConfigError, CheckpointError."""
        made = cls.__new__(cls)
        made._load(AsyncLLM.of(settings))
        return made

    def _load(self, model: AsyncLLM) -> None:
        self._async = model
        self._thread = LoopThread()
        self._finalize = weakref.finalize(self, _close, self._thread, self._async)
        OPEN.add(self)
        try:
            self._thread.run(self._async.start())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends what runs with an error, and frees the model. Idempotent."""
        self._finalize()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def model_name(self) -> str:
        return self._async.model_name

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of a prompt and its completion together; None is no limit."""
        return self._async.max_model_len

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where no `sampling_params` are given: vLLM's defaults, but for what the settings or the model's
        folder say."""
        return self._async.get_default_sampling_params()

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template of its own; else each message is a line of its role and its content."""
        return self._async.has_chat_template

    def check(self, sampling_params: SamplingParams) -> None:
        """Raises InvalidRequest where a completion could not have these."""
        self._thread.run(self._async.check(sampling_params))

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._thread.run(self._async.get_tokenizer())

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: UseTqdm = True,
        priority: Priority = None,
        state: Begin = None,
    ) -> list[RequestOutput]:
        """Completes prompts, and returns the completions in their order.

        Args:
            prompts: a text, token ids, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or a list of any of these.
            sampling_params: for all prompts, or a list of one for each; None is `get_default_sampling_params()`.
            use_tqdm: whether several prompts have a progress bar, or what makes one as `tqdm` does.
            priority: for all, or for each; lower goes first.
            state: a saved state, or its id, that all prompts come after, or a list of one for each.
        """
        given = gathered(prompts)
        asked = self._async.generate(given, sampling_params, use_tqdm=use_tqdm, priority=priority, state=state)
        return self._thread.run(asked)

    def chat(
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
        """Continues conversations by the model's chat template, and returns the completions in their order.

        Args:
            messages: a list of messages, `{"role": …, "content": …}`, or a list of such lists.
            tools: that the model may call, as in OpenAI's API; a call is a part of the text.
            chat_template_kwargs: variables of the template.

        The others are those of `generate`.
        """
        return self._thread.run(
            self._async.chat(
                gathered(messages),
                sampling_params,
                use_tqdm=use_tqdm,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                priority=priority,
                state=state,
            )
        )

    def stream(
        self,
        prompt: Prompt | Iterable[Message],
        sampling_params: SamplingParams | None = None,
        *,
        state: State | str | None = None,
    ) -> Pieces:
        """Starts a completion, or of a list of messages the response to it, and returns an iterator of its pieces.

        Each has the text and the tokens that have come since the one before; of `n` completions, `index` says whose
        they are. Closing the iterator ends what is not there yet.
        """
        stream = self._thread.run(self._async.open_stream(gathered(prompt), sampling_params, state))
        return Pieces(self, self._thread, self._async.pieces(stream), stream)

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        use_tqdm: UseTqdm = True,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Makes vectors of prompts, of length 1.

        Args:
            dimensions: the first ones, that are kept; None is all.
            truncate_prompt_tokens: the last tokens of each prompt, that are read; None is all.
        """
        asked = self._async.embed(
            gathered(prompts), use_tqdm=use_tqdm, dimensions=dimensions, truncate_prompt_tokens=truncate_prompt_tokens
        )
        return self._thread.run(asked)

    def score(
        self,
        prompts: Prompt | Iterable[Prompt | tuple[Prompt, Prompt]],
        continuations: Prompt | Iterable[Prompt] | None = None,
        *,
        use_tqdm: UseTqdm = True,
    ) -> list[ScoringRequestOutput]:
        """Says how likely texts are: the log-probability of each continuation after its prompt.

        Args:
            prompts: with `continuations`, one or many; one goes with all of the other ones. Without, a list of pairs,
                or whole texts, which are scored after the token that the model's texts begin with.
        """
        return self._thread.run(self._async.score(gathered(prompts), gathered(continuations), use_tqdm=use_tqdm))

    def neurons(
        self, prompts: Prompt | Iterable[Prompt], top: int = 16, *, use_tqdm: UseTqdm = True
    ) -> list[NeuronsRequestOutput]:
        """Shows which neurons the tokens of prompts fire, in each layer. Nothing is generated.

        Args:
            top: how many of the strongest of each layer; `active` is of all of them.
        """
        return self._thread.run(self._async.neurons(gathered(prompts), top, use_tqdm=use_tqdm))

    def save_state(
        self, of: Prompt | RequestOutput, *, metadata: Mapping[str, str] | None = None, ttl: float | None = None
    ) -> State:
        """Saves the state after a prompt, or after a prompt and its first completion.

        Args:
            of: a prompt, or what `generate` or `chat` has returned for one.
            metadata: up to 16 texts by name.
            ttl: seconds that it is kept; None is `store.ttl_seconds`. Without `store.path`, states end with the model.
        """
        return self._thread.run(self._async.save_state(of, metadata=metadata, ttl=ttl))

    def fork_state(
        self, state: State | str, *, metadata: Mapping[str, str] | None = None, ttl: float | None = None
    ) -> State:
        """Makes a new state that is the same, with metadata and a time of its own; both share a file. To begin several
        completions in one state takes no fork."""
        return self._thread.run(self._async.fork_state(state, metadata=metadata, ttl=ttl))

    def list_states(self) -> list[State]:
        """The saved states, the newest first."""
        return self._thread.run(self._async.list_states())

    def delete_state(self, state: State | str) -> None:
        """Deletes a state. What has begun in it goes on."""
        self._thread.run(self._async.delete_state(state))

    def export_state(self, state: State | str, path: File) -> None:
        """Writes a state to a safetensors file, whole or not at all. Raises OSError, too."""
        self._thread.run(self._async.export_state(state, path))

    def import_state(self, path: File, *, metadata: Mapping[str, str] | None = None, ttl: float | None = None) -> State:
        """Stores the state in a file that was exported here, or downloaded from a server. Raises OSError, too."""
        return self._thread.run(self._async.import_state(path, metadata=metadata, ttl=ttl))

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text."""
        return self._thread.run(self._async.tokenize(text, add_special_tokens=add_special_tokens))

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self._thread.run(self._async.detokenize(tokens))


class Pieces(Iterator[CompletionOutput]):
    """The pieces of a stream. It ends when they do, or by `close`."""

    def __init__(self, llm: LLM, thread: LoopThread, pieces: AsyncIterator[CompletionOutput], stream: Stream) -> None:
        self._llm = llm  # which would be closed if nobody had it
        self._thread = thread
        self._pieces = pieces
        self._finalize = weakref.finalize(self, thread.call, stream.close)

    def __next__(self) -> CompletionOutput:
        piece = self._thread.run(self._next()) if self._finalize.alive else None
        if piece is None:
            self.close()
            raise StopIteration
        return piece

    def close(self) -> None:
        """Ends what is not there yet. Idempotent."""
        self._finalize()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _next(self) -> CompletionOutput | None:
        """None at the end. What it raises, also where it is cancelled, has closed the stream."""
        return await anext(self._pieces, None)


def _close(thread: LoopThread, llm: AsyncLLM) -> None:
    if thread.is_lost:  # at the end of a forked process, which has but a copy of the model's memory
        return
    if thread.is_own:  # the garbage collector's choice
        thread.call(lambda: asyncio.ensure_future(llm.close()).add_done_callback(lambda _: thread.stop()))
        return
    try:
        thread.run(llm.close())
    finally:
        thread.stop()


def _close_all() -> None:
    for llm in [*OPEN]:
        llm.close()


# Their threads must not be at work when the interpreter is taken down; what closes them needs threads itself, which
# `atexit` is too late for. `concurrent.futures` ends its own in the same way.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
