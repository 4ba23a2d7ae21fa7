"""Conversations on a virtual clock: who says what, and when. Knows nothing of engines."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from bdh_batch.messages import GenerationRequest, Origin, Prompt, SamplingParams

SAMPLING = SamplingParams()


@dataclass(frozen=True)
class Chats:
    """What conversations look like; lengths in tokens, means of exponential distributions but for the first.

    Args:
        first: the number of the first system prompt.
        instructions: of the system prompt that a conversation begins with, one of `stems`.
        turns: the mean number of turns, of a geometric distribution.
        pause: mean seconds between a response and the next turn.
        breaks: whether a prompt says where its turns end, as one made of messages does.
    """

    stems: int = 32
    instructions: int = 128
    message: int = 48
    answer: int = 48
    turns: float = 4.0
    pause: float = 5.0
    first: int = 0
    breaks: bool = True

    @property
    def prompt_tokens(self) -> float:
        """The mean of all requests, with the turns before."""
        return self.instructions + self.message + (self.turns - 1) * (self.message + self.answer)


class Conversation:
    """One conversation: each request has all that was said before as its prompt."""

    def __init__(self, number: int, chats: Chats, draw: random.Random) -> None:
        self.number = number
        self._chats, self._draw = chats, draw
        stem = random.Random(chats.first + draw.randrange(chats.stems))
        self._said = [stem.randrange(2, 256) for _ in range(chats.instructions)]
        self._breaks = [len(self._said)]
        self._turns = 0

    def next(self) -> GenerationRequest:
        """The request of the next turn."""
        length = 1 + int(self._draw.expovariate(1 / self._chats.message))
        self._said = [*self._said, *(self._draw.randrange(2, 256) for _ in range(length))]
        self._turns += 1
        answer = 1 + int(self._draw.expovariate(1 / self._chats.answer))
        origin = Origin(f"{self.number}-{self._turns}")
        prompt = Prompt(self._said, breaks=tuple(self._breaks) if self._chats.breaks else ())
        return GenerationRequest(origin, [prompt], answer, sampling=SAMPLING)

    def heard(self, answer: list[int]) -> float | None:
        """Takes the response; returns the seconds until the next turn, or None where this was the last one."""
        self._said = [*self._said, *answer]
        self._breaks = [*self._breaks, len(self._said)]
        if self._draw.random() < 1 / self._chats.turns:
            return None
        return self._draw.expovariate(1 / self._chats.pause)


def conversations(chats: Chats, rate: float, seed: int) -> Iterator[tuple[float, Conversation]]:
    """Endlessly many of them, each with the second in which it begins; `rate` is requests a second in the long run."""
    draw, now, number = random.Random(seed), 0.0, 0
    while True:
        now += draw.expovariate(rate / chats.turns)
        yield now, Conversation(number, chats, random.Random(draw.getrandbits(64)))
        number += 1
