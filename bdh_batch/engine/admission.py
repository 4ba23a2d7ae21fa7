"""Decides which requests may wait in the queue: they are counted and bounded here. Shared between threads.

Refused is what finds the queue full, in requests or in tokens, and what would wait past its deadline at the rate at
which slots have been given out of late. A full queue is full for those who fill it: one of an earlier priority, or of a
tenant with far fewer requests in it, is let in, and so many of those who fill it are shed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence as Many

from bdh_batch.errors import InvalidRequest, QueueFull, TooLate
from bdh_batch.scheduler.backlog import NO_UNIT, Backlog
from bdh_batch.scheduler.sequence import QueueKey, Sequence

HALF_LIFE = 10.0  # seconds after which a measured rate counts half
FORGET = 30.0  # seconds after which a rate is no longer believed, if no request has waited
LONGEST_RETRY = 60


class Admission:
    """Admits requests to the queue, or refuses them.

    Args:
        max_requests, max_tokens: most sequences, and tokens of their prompts, that may wait for a slot.
        slots: how many sequences can hold a state.
        patience: seconds after which a sequence that waits competes in the first priority.
        unit: tokens of a prompt that fill the queue as another sequence does.
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        slots: int,
        patience: float = math.inf,
        unit: int = NO_UNIT,
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self._slots = slots
        self._patience = patience
        self._lock = threading.Lock()
        self._backlog = Backlog(unit)
        self._arriving = 0  # of those that wait, how many have not come to the scheduler yet
        self._free = slots
        self._served = 0
        self._last_priority: int | None = None
        self._measured = (0.0, 0.0)  # slots given and seconds gone by while someone waited, both fading
        self._sent_away = 0.0  # seconds that those who were refused were asked to stay away, fading alike
        self._updated: float | None = None
        self._waited: float | None = None  # when someone was last seen to wait

    @property
    def queued(self) -> int:
        return len(self._backlog)

    @property
    def prompt_tokens(self) -> int:
        """Of the prompts that wait."""
        return self._backlog.tokens

    def queues(self, most: int) -> dict[str, int]:
        """How many sequences of each tenant wait: of those of whom most do."""
        with self._lock:
            return self._backlog.longest(most)

    def admit(self, sequences: Many[Sequence], now: float, resumed: bool = False) -> bool:
        """Counts all of `sequences`, or none. Gives whether others have to go for them; for those that are `resumed`
        nobody has, and they are always let in.

        Raises:
            InvalidRequest: they are more than could ever wait and run.
            QueueFull, TooLate: not now.
        """
        if resumed:
            with self._lock:
                self._count(sequences)
            return False
        most = self._slots + self.max_requests
        if len(sequences) > most:
            options = "scheduler.max_running + scheduler.max_queued_requests"
            raise InvalidRequest(f"A request may have at most {most} completions, prompts times n ({options}).")
        tokens = sum(len(sequence.prompt) for sequence in sequences)
        if len(sequences) > self._slots and tokens > self.max_tokens:
            text = f"A request may have at most {self.max_tokens} prompt tokens, times n (scheduler.max_queued_tokens)."
            raise InvalidRequest(text)
        with self._lock:
            self._check_deadlines(sequences, now)
            sheds = self._sheds_others(sequences, tokens)
            self._count(sequences)
            return sheds

    def _count(self, sequences: Many[Sequence]) -> None:
        for sequence in sequences:
            self._backlog.add(sequence)
        self._arriving += len(sequences)

    def arrived(self, sequences: Many[Sequence], changes: Mapping[Sequence, int]) -> None:
        """The scheduler has taken them, and says by `changes` which wait there since then (1), and no longer (-1)."""
        with self._lock:
            for sequence in sequences:
                self._backlog.remove(sequence)
            self._arriving -= len(sequences)
            self._apply(changes)

    def update(
        self,
        changes: Mapping[Sequence, int],
        free: int,
        served: int,
        now: float,
        last_priority: int | None = None,
    ) -> None:
        """Takes in which sequences wait in the scheduler now, and no longer, how many slots are free and how many were
        ever given, and before which priority one need not wait at all."""
        with self._lock:
            if self._updated is not None and len(self._backlog) > self._arriving:
                seconds = now - self._updated
                fade = 0.5 ** (seconds / HALF_LIFE)
                given, passed = self._measured
                self._measured = given * fade + served - self._served, passed * fade + seconds
                self._sent_away *= fade
                self._waited = now
            elif self._waited is not None and now - self._waited > FORGET:
                # The old rate says nothing any more, and would refuse the requests that could measure a new one.
                self._measured, self._sent_away = (0.0, 0.0), 0.0
            self._updated, self._served, self._free = now, served, free
            self._last_priority = last_priority
            self._apply(changes)

    def _apply(self, changes: Mapping[Sequence, int]) -> None:
        for sequence, change in changes.items():
            (self._backlog.add if change > 0 else self._backlog.remove)(sequence)

    def expected_wait(self, more: int, queue_key: QueueKey) -> float:
        """Seconds until `more` sequences would all have a slot; 0 while there is nothing to go by."""
        priority, tenant = queue_key
        given, passed = self._measured
        if given <= 0 or (self._last_priority is not None and priority < self._last_priority):
            return 0.0

        def seconds(ahead: int) -> float:
            return max(0, ahead - self._free) * passed / given

        wait = seconds(self._backlog.ahead(queue_key, more))
        if wait <= self._patience:
            return wait
        return min(wait, self._patience + seconds(self._backlog.ahead_of_tenant(tenant, more)))

    def excess(self, requests: int, tokens: int, free: int) -> tuple[int, int]:
        """What is too much in a queue of so many requests and tokens of prompts, while so many slots are free."""
        if requests <= free:
            return 0, 0
        return max(0, requests - self.max_requests - free), max(0, tokens - self.max_tokens)

    def _sheds_others(self, sequences: Many[Sequence], tokens: int) -> bool:
        """Whether others have to go that they can wait. Raises QueueFull where those may not."""
        queued, waiting = self.queued, self._backlog.tokens
        requests, surplus = self.excess(queued + len(sequences), waiting + tokens, self._free)
        if not (requests or surplus):
            return False
        size = sum(map(self._backlog.size, sequences))
        # A request that would shed most of the queue does not.
        if tokens * 2 <= self.max_tokens and self._backlog.gives_way(sequences[0].queue_key, size):
            return True
        seconds = self.retry_after()
        self._sent_away += seconds
        many = f"{queued} requests" if requests else f"{waiting} prompt tokens"
        raise QueueFull(f"The queue is full: {many} are waiting.", seconds)

    def _check_deadlines(self, sequences: Many[Sequence], now: float) -> None:
        first = sequences[0]
        limits = [limit - now for limit in (first.queue_deadline, first.deadline) if limit is not None]
        wait = self.expected_wait(len(sequences), first.queue_key)
        if limits and wait > min(limits):
            text = f"The estimated wait of {wait:.0f} s is longer than the request's timeout."
            raise TooLate(text, _whole_seconds(wait - min(limits)))

    def retry_after(self) -> int:
        """Seconds until the next slot will have been given out, and all who stay away could have had one: by Little's
        law they are as many as there were seconds asked of clients in a second. So no more ask again than there are
        slots for, and responses have the time that refusing takes."""
        given, passed = self._measured
        return _whole_seconds(max(passed, self._sent_away) / given) if given > 0 else 1


def _whole_seconds(seconds: float) -> int:
    return min(LONGEST_RETRY, max(1, math.ceil(seconds)))
