"""The interface that the HTTP layer has to a backend: prompts and requests in, deltas out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, runtime_checkable

from bdh_batch.messages import Delta, GenerationRequest, Prompt, SavedState, Taker, Text, Usage, Written
from bdh_batch.messages.state import Warmed
from bdh_batch.text.tokenizer import Tokenizer

RawPrompt = tuple[str, Text | Sequence[int]]  # the request's field, and the prompt in it, which is not checked yet

# Is called with the tokens that were generated, and the last delta of the first sequence that failed or was aborted.
Ended = Callable[[int, Delta | None], None]


class Generation(Protocol):
    """A request that is being computed: the deltas of its sequences, and what is known of them."""

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        """The tokens of each sequence's prompt."""

    @property
    def cached_tokens(self) -> Sequence[int]:
        """How many tokens of each sequence's prompt were taken from a cached prefix."""

    def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """Yields the sequences' new deltas, each with its sequence's index, until all have ended or were aborted."""

    def usage(self, completion_tokens: int) -> Usage:
        """Returns the tokens of its prompts, and of its completions, of which `completion_tokens` have been read."""

    def abort(self) -> None:
        """Ends the sequences that still run. Idempotent. The reader of a generation has to call it in any case, also
        after the last delta."""

    def on_end(self, ended: Ended) -> None:
        """Registers `ended`, which is called once, at the first `abort`."""


@runtime_checkable
class DirectGeneration(Protocol):
    """What a generation has besides whose deltas can be taken as they come, in a callback of the event loop."""

    def offer_to(self, taker: Taker) -> None:
        """From now on, deltas that come while the generation's reader waits for the next ones are offered to `taker`,
        and yielded only where it does not take them."""


class Backend(Protocol):
    """Generates completions and tokenizes prompts for the HTTP layer."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, with which responses name single tokens."""

    async def tokenized(self, prompts: Sequence[RawPrompt], last: int | None = None) -> list[Prompt]:
        """Returns the prompts as tokens; with `last`, only so many of each prompt's last tokens.

        Raises:
            InvalidRequest: there is no tokenizer, or a prompt is empty, or contains a token that is not the model's.
        """

    async def generate(self, request: GenerationRequest) -> Generation:
        """Starts all sequences of a request, or none.

        Raises:
            InvalidRequest: the request cannot be served.
            QueueFull, Unavailable: the request cannot be served now.
        """

    async def tokenize(self, prompt: Text, param: str) -> Sequence[int]:
        """Returns the tokens of a text. Raises InvalidRequest, naming `param`, where there is no tokenizer."""

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens.

        Raises:
            InvalidRequest: there is no tokenizer, or a token is not the model's.
        """

    def load(self) -> int:
        """The number of requests that are being computed."""

    def health(self) -> str | None:
        """Returns what is wrong with this process, or None."""

    def ready(self) -> str | None:
        """Returns why the backend cannot generate at present, or None if it can."""

    async def drain(self, seconds: float) -> None:
        """Waits until running requests have finished; after `seconds`, ends the others with an error."""

    def close(self) -> None:
        """Releases the engine. Idempotent."""


@runtime_checkable
class SharedBackend(Protocol):
    """What a backend has besides whose requests are computed by engines that each have cached prefixes of their own."""

    @property
    def engines(self) -> int:
        """How many there are."""


@runtime_checkable
class WarmedBackend(Protocol):
    """What a backend has besides if its only engine is in this process: it can read states from files in advance."""

    async def warm(self, state: SavedState, tokens: bytes, cache_namespace: str, salt: str) -> Warmed:
        """Has a state read and cached when the engine has nothing else to do, and returns what has become of it. To be
        awaited before the next one.

        Args:
            tokens: all that have entered it, as 32-bit integers.
            cache_namespace, salt: those of the requests that may begin there.
        """


@runtime_checkable
class TextBackend(Protocol):
    """What a backend has besides that takes what clients write instead of tokens: an upstream."""

    @property
    def takes_messages(self) -> bool:
        """Whether it takes a conversation as it came; else a template makes a text of it."""

    @property
    def pass_headers(self) -> Sequence[str]:
        """The names of the client's headers that it passes on, in lower case."""

    async def accept(self, written: Written, param: str) -> tuple[Written, list[Prompt]]:
        """Returns what is passed on of a request, and its prompts, of which only the number of tokens counts.

        Args:
            param: the field of the prompts.

        Raises:
            UnsupportedParameter: it asks for something that the upstream has no way to express.
        """
