"""Random texts of a wanted length in tokens, counted by any counter."""

from __future__ import annotations

import asyncio
from random import Random
from string import ascii_lowercase

from bdh_batch.bench.tokens import Tokens

ROUNDS = 8  # of adding and cutting until a text has its length
SAMPLE_CHARACTERS = 2000
AT_ONCE = 16  # questions to a server's tokenizer


def words(draw: Random, characters: int) -> str:
    """Random words, of exactly so many characters; they begin like no other ones."""
    found, length = [], 0
    while length < characters:
        word = "".join(draw.choices(ascii_lowercase, k=draw.randint(2, 9))) + " "
        found.append(word)
        length += len(word)
    return "".join(found)[:characters]


class Writer:
    """Writes texts. The same generator gives the same text, in whatever order they are asked for."""

    def __init__(self, tokens: Tokens, characters_per_token: float) -> None:
        self.tokens = tokens
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._characters_per_token = characters_per_token

    @classmethod
    async def with_tokens(cls, tokens: Tokens) -> Writer:
        sample = words(Random(0), SAMPLE_CHARACTERS)
        return cls(tokens, SAMPLE_CHARACTERS / max(1, await tokens.count(sample)))

    async def count(self, text: str) -> int:
        async with self._limit:
            return await self.tokens.count(text)

    async def text(self, draw: Random, length: int) -> tuple[str, int]:
        """A text of `length` tokens, or as near as the tokenizer lets it come, and how many it has."""
        if not length:
            return "", 0
        async with self._limit:
            text = words(draw, max(1, round(length * self._characters_per_token)))
            for _ in range(ROUNDS):
                count = await self.tokens.count(text)
                if count == length:
                    return text, count
                if count > length:
                    text = await self.tokens.cut(text, length)
                else:
                    text += words(draw, max(1, round((length - count) * self._characters_per_token)))
            return text, await self.tokens.count(text)
