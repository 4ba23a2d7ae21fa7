"""What the HTTP layer asks of a backend, which generates."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from bdh_batch.messages import Delta, GenerationRequest, Prompt, Text
from bdh_batch.text.tokenizer import Tokenizer

Unread = tuple[str, Text | Sequence[int]]  # a prompt as it came, behind the field that it came in

# Tokens that were generated, and the end of the first sequence that failed or was aborted, if one was.
Ended = Callable[[int, Delta | None], None]


class Generation(Protocol):
    """The completions of one client's request, which may ask for several sequences."""

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        """The prompt's tokens of each sequence."""

    @property
    def cached_tokens(self) -> Sequence[int]:
        """Tokens of each sequence's prompt that did not have to be computed."""

    def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What the sequences gained since the last time, by their index; ends when all have ended or were aborted."""

    def abort(self) -> None:
        """Ends what still runs; nothing more is computed for it. Idempotent. The reader of a generation ends with it,
        also where all has ended."""

    def on_end(self, ended: Ended) -> None:
        """Has `ended` called once, at the first `abort`."""


class Backend(Protocol):
    """Generates for the HTTP layer."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's, for what is reported of single tokens."""

    async def tokenized(self, prompts: Sequence[Unread], last: int | None = None) -> list[Prompt]:
        """The prompts as tokens, each the `last` of them only where that is said.

        Raises:
            InvalidRequest: there is no tokenizer, or a prompt that is empty, or has a token that is not the model's.
        """

    async def generate(self, request: GenerationRequest) -> Generation:
        """Starts all of its sequences, or none.

        Raises:
            InvalidRequest: one that cannot be served.
            QueueFull, Unavailable: not now.
        """

    async def tokenize(self, prompt: Text, param: str) -> Sequence[int]:
        """Raises InvalidRequest, naming `param`, where there is no tokenizer."""

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Raises InvalidRequest where there is no tokenizer, or one of `tokens` is not the model's."""

    def load(self) -> int:
        """Generations under way."""

    def health(self) -> str | None:
        """What is wrong with this process, or None."""

    def ready(self) -> str | None:
        """Why nothing can be generated now, or None."""

    async def drain(self, seconds: float) -> None:
        """Waits for what runs to finish; what has not after `seconds` ends with an error."""

    def close(self) -> None:
        """Frees everything. Idempotent."""
