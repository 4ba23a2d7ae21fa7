"""What the front door asks of whoever answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from bdh_batch.messages import Delta, GenerationRequest


class Generation(Protocol):
    """The answers to one client's request, which may ask for several sequences."""

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        """The prompt's tokens of each sequence."""

    @property
    def cached_tokens(self) -> Sequence[int]:
        """Tokens of each sequence's prompt that did not have to be computed."""

    def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What the sequences gained since the last time, by their index; ends when all have ended or were aborted."""

    def abort(self) -> None:
        """Ends what still runs; nothing more is computed for it. Idempotent."""


class Backend(Protocol):
    def tokens(self, request: GenerationRequest) -> Sequence[int]:
        """The tokens of the prompt of `request`. Raises InvalidRequest: it has none."""

    def generate(self, requests: Sequence[GenerationRequest]) -> Generation:
        """Starts all of `requests`, or none.

        Raises:
            InvalidRequest: a prompt that cannot be served.
            QueueFull, Unavailable: not now.
        """

    def health(self) -> str | None:
        """What is wrong, or None."""

    async def drain(self, seconds: float) -> None:
        """Waits for what runs to finish; what has not after `seconds` ends with an error."""

    def close(self) -> None:
        """Frees everything. Idempotent."""
