"""Turns text into a model's tokens and back, with checks, and off the event loop where that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from bdh_batch.backends.base import RawPrompt
from bdh_batch.errors import InvalidRequest
from bdh_batch.messages import Prompt, Text
from bdh_batch.text.tokenizer import TokenIdsOnly, Tokenizer, decode

T = TypeVar("T")

LONG = 16384  # characters; what is shorter is tokenized in a few milliseconds, and waits for no thread
PART = 65536  # tokens that are checked at a time


class Tokenization:
    """Encodes and decodes with a model's tokenizer, and checks that token ids are the model's.

    Args:
        vocab_size: token ids below it are the model's.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size

    async def prompts(self, prompts: Sequence[RawPrompt], last: int | None = None) -> list[Prompt]:
        """As `Backend.tokenized`."""
        size = sum(len(prompt.text if isinstance(prompt, Text) else prompt) for _, prompt in prompts)
        return await off_the_loop(size, lambda: [self._prompt(*each, last) for each in prompts])

    async def tokenize(self, prompt: Text, param: str) -> Sequence[int]:
        """As `Backend.tokenize`."""
        tokens, _ = await off_the_loop(len(prompt.text), self._encode, prompt, param)
        return tokens

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """As `Backend.detokenize`."""
        await off_the_loop(len(tokens), self.check, tokens, "tokens")
        if isinstance(self.tokenizer, TokenIdsOnly):
            raise InvalidRequest("This model has no tokenizer.", "tokens")
        text, _ = await off_the_loop(len(tokens), decode, self.tokenizer, tokens)
        return text

    def check(self, tokens: Sequence[int], param: str) -> None:
        """Raises InvalidRequest, naming `param`, where one is not the model's."""
        if not self.knows(tokens):
            raise InvalidRequest(f"{param}: Token ids run from 0 to {self.vocab_size - 1}.", param)

    def check_each(self, tokens: Sequence[int], param: str) -> None:
        """As `check`, but the error names the token by its index, as in `stop_token_ids[3]`."""
        if not self.knows(tokens):
            at = next(at for at, token in enumerate(tokens) if not self.knows([token]))
            self.check([tokens[at]], f"{param}[{at}]")

    def knows(self, tokens: Sequence[int]) -> bool:
        """Returns whether all are tokens of the model. In parts, as `min` does not release the interpreter's lock."""
        parts = (tokens[at : at + PART] for at in range(0, len(tokens), PART))
        return all(0 <= min(part) <= max(part) < self.vocab_size for part in parts)

    def _prompt(self, param: str, prompt: Text | Sequence[int], last: int | None) -> Prompt:
        tokens: Text | Sequence[int] = prompt
        breaks: tuple[int, ...] = ()
        if isinstance(tokens, Text):
            tokens, breaks = self._encode(tokens, param)
        else:
            self.check(tokens, param)
        if not tokens:
            raise InvalidRequest(f"{param}: Input should not be empty.", param)
        if last is None or (begin := len(tokens) - last) <= 0:
            return Prompt(tokens, param, breaks)
        return Prompt(tokens[begin:], param, tuple(at - begin for at in breaks if at > begin))

    def _encode(self, prompt: Text, param: str) -> tuple[Sequence[int], tuple[int, ...]]:
        try:
            return self.tokenizer.encode_prompt(prompt)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param) from error


async def off_the_loop(size: int, work: Callable[..., T], *arguments: Any) -> T:
    """Runs `work`, in a thread where its input is so long that it would block the event loop."""
    return await asyncio.to_thread(work, *arguments) if size > LONG else work(*arguments)
