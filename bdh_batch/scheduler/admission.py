"""Who is let in to wait: counted and bounded here and nowhere else. Shared between threads.

Refused is what finds the queue full, in requests or in tokens, and what would wait past its deadline at the rate at
which places have been given out of late.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping, Sequence as Many

from bdh_batch.errors import InvalidRequest, QueueFull
from bdh_batch.scheduler.sequence import Sequence

HALF_LIFE = 10.0  # seconds after which a measured rate counts half
FORGET = 30.0  # seconds after which a rate is no longer believed, if nobody has waited
LONGEST_RETRY = 60


class Admission:
    """
    Args:
        max_requests, max_tokens: most sequences, and tokens of their prompts, that may wait for a place.
        places: how many sequences can hold a state.
    """

    def __init__(self, max_requests: int, max_tokens: int, places: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self._places = places
        self._lock = threading.Lock()
        self._arriving: Counter[int] = Counter()  # let in, by priority, and not yet in the scheduler
        self._arriving_tokens = 0
        self._waiting: Counter[int] = Counter()  # in the scheduler, likewise
        self._waiting_tokens = 0
        self._free = places
        self._served = 0
        self._measured = (0.0, 0.0)  # places given and seconds gone by while someone waited, both fading
        self._updated: float | None = None
        self._waited: float | None = None  # when someone was last seen to wait

    @property
    def queued(self) -> int:
        return self._arriving.total() + self._waiting.total()

    def admit(self, sequences: Many[Sequence], now: float) -> None:
        """Counts all of `sequences`, or none.

        Raises:
            InvalidRequest: they are more than could ever wait and run.
            QueueFull: not now.
        """
        most = self._places + self.max_requests
        if len(sequences) > most:
            raise InvalidRequest(f"A request may ask for {most} answers in all here, prompts times n.")
        tokens = sum(len(sequence.prompt) for sequence in sequences)
        if len(sequences) > self._places and tokens > self.max_tokens:
            raise InvalidRequest(f"A request may have {self.max_tokens} prompt tokens in all here, prompts times n.")
        with self._lock:
            self._check_bounds(len(sequences), tokens)
            self._check_deadlines(sequences, now)
            self._arriving.update(sequence.priority for sequence in sequences)
            self._arriving_tokens += tokens

    def arrived(self, sequences: Many[Sequence]) -> None:
        """The scheduler has taken them; its next `update` counts them."""
        with self._lock:
            self._arriving.subtract(sequence.priority for sequence in sequences)
            self._arriving_tokens -= sum(len(sequence.prompt) for sequence in sequences)
            self._waiting.update(sequence.priority for sequence in sequences)
            self._waiting_tokens += sum(len(sequence.prompt) for sequence in sequences)

    def update(self, waiting: Mapping[int, int], tokens: int, free: int, served: int, now: float) -> None:
        """What waits in the scheduler by priority, how many places are free, how many were ever given."""
        with self._lock:
            if self._updated is not None and self._waiting.total() > 0:
                seconds = now - self._updated
                fade = 0.5 ** (seconds / HALF_LIFE)
                given, passed = self._measured
                self._measured = given * fade + served - self._served, passed * fade + seconds
                self._waited = now
            elif self._waited is not None and now - self._waited > FORGET:
                self._measured = (0.0, 0.0)  # how it was says nothing any more, and would refuse whoever could find out
            self._updated, self._served = now, served
            self._waiting, self._waiting_tokens, self._free = Counter(waiting), tokens, free

    def expected_wait(self, more: int, priority: int) -> float:
        """Seconds until `more` sequences would all have a place; 0 while there is nothing to go by."""
        before = sum(n for queue in (self._arriving, self._waiting) for p, n in queue.items() if p <= priority)
        given, passed = self._measured
        return max(0, before + more - self._free) * passed / given if given > 0 else 0.0

    def _check_bounds(self, more: int, tokens: int) -> None:
        queued = self.queued
        if queued + more <= self._free:
            return
        if queued + more > self.max_requests + self._free:
            raise QueueFull(f"{queued} requests are waiting already.", self._retry_after(1))
        waiting = self._arriving_tokens + self._waiting_tokens
        if waiting + tokens > self.max_tokens:
            text = f"{waiting} prompt tokens are waiting already, and {self.max_tokens} may."
            raise QueueFull(text, self._retry_after(1))

    def _check_deadlines(self, sequences: Many[Sequence], now: float) -> None:
        first = sequences[0]
        limits = [limit - now for limit in (first.queue_deadline, first.deadline) if limit is not None]
        wait = self.expected_wait(len(sequences), first.priority)
        if limits and wait > min(limits):
            text = f"The wait would be about {wait:.0f} s, longer than the request may take."
            raise QueueFull(text, _whole_seconds(wait - min(limits)))

    def _retry_after(self, more: int) -> int:
        """Seconds until so many places will have been given out."""
        given, passed = self._measured
        return _whole_seconds(more * passed / given) if given > 0 else 1


def _whole_seconds(seconds: float) -> int:
    return min(LONGEST_RETRY, max(1, math.ceil(seconds)))
