"""Who is let in to wait: counted and bounded here and nowhere else. Shared between threads.

Refused is what finds the queue full, in requests or in tokens, and what would wait past its deadline at the rate at
which places have been given out of late. A full queue is full for those who fill it: one of an earlier class, or of a
tenant with far fewer requests in it, is let in, and so many of the longest line are sent away.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence as Many

from bdh_batch.errors import InvalidRequest, QueueFull, TooLate
from bdh_batch.scheduler.fair_queue import Line, count_out
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
        self._arriving: Counter[Line] = Counter()  # let in, and not yet in the scheduler
        self._arriving_tokens = 0
        self._waiting: Counter[Line] = Counter()  # in the scheduler
        self._waiting_tokens = 0
        self._free = places
        self._served = 0
        self._last_class: int | None = None
        self._measured = (0.0, 0.0)  # places given and seconds gone by while someone waited, both fading
        self._sent_away = 0.0  # seconds that those who were refused were told to stay away, fading alike
        self._updated: float | None = None
        self._waited: float | None = None  # when someone was last seen to wait

    @property
    def queued(self) -> int:
        return self._arriving.total() + self._waiting.total()

    def admit(self, sequences: Many[Sequence], now: float) -> bool:
        """Counts all of `sequences`, or none. Gives whether others have to go for them.

        Raises:
            InvalidRequest: they are more than could ever wait and run.
            QueueFull, TooLate: not now.
        """
        most = self._places + self.max_requests
        if len(sequences) > most:
            raise InvalidRequest(f"A request may ask for {most} answers in all here, prompts times n.")
        tokens = sum(len(sequence.prompt) for sequence in sequences)
        if len(sequences) > self._places and tokens > self.max_tokens:
            raise InvalidRequest(f"A request may have {self.max_tokens} prompt tokens in all here, prompts times n.")
        with self._lock:
            self._check_deadlines(sequences, now)
            displacing = self._is_displacing(sequences[0].line, len(sequences), tokens)
            self._arriving.update(sequence.line for sequence in sequences)
            self._arriving_tokens += tokens
            return displacing

    def arrived(self, sequences: Many[Sequence]) -> None:
        """The scheduler has taken them; its next `update` counts them."""
        with self._lock:
            for sequence in sequences:
                count_out(self._arriving, sequence.line)
            self._arriving_tokens -= sum(len(sequence.prompt) for sequence in sequences)
            self._waiting.update(sequence.line for sequence in sequences)
            self._waiting_tokens += sum(len(sequence.prompt) for sequence in sequences)

    def update(
        self,
        waiting: Counter[Line],
        tokens: int,
        free: int,
        served: int,
        now: float,
        last_class: int | None = None,
    ) -> None:
        """What waits in the scheduler, how many places are free, how many were ever given, before which class one
        need not wait at all."""
        with self._lock:
            if self._updated is not None and self._waiting.total() > 0:
                seconds = now - self._updated
                fade = 0.5 ** (seconds / HALF_LIFE)
                given, passed = self._measured
                self._measured = given * fade + served - self._served, passed * fade + seconds
                self._sent_away *= fade
                self._waited = now
            elif self._waited is not None and now - self._waited > FORGET:
                # How it was says nothing any more, and would refuse whoever could find out.
                self._measured, self._sent_away = (0.0, 0.0), 0.0
            self._updated, self._served = now, served
            self._waiting, self._waiting_tokens, self._free = waiting, tokens, free
            self._last_class = last_class

    def expected_wait(self, more: int, line: Line) -> float:
        """Seconds until `more` sequences would all have a place; 0 while there is nothing to go by."""
        priority, _ = line
        if self._last_class is not None and priority < self._last_class:
            return 0.0
        own = self._count(line) + more
        before = 0
        # Others of the class take turns with this tenant, so that of each no more go first than it has itself.
        for (other, whose), count in (self._arriving + self._waiting).items():
            if (other, whose) != line and other <= priority:
                before += count if other < priority else min(count, own)
        given, passed = self._measured
        return max(0, before + own - self._free) * passed / given if given > 0 else 0.0

    def _count(self, line: Line) -> int:
        return self._arriving[line] + self._waiting[line]

    def excess(self, requests: int, tokens: int, free: int) -> tuple[int, int]:
        """What is too much in a queue of so many requests and tokens of prompts, while so many places are free."""
        if requests <= free:
            return 0, 0
        return max(0, requests - self.max_requests - free), max(0, tokens - self.max_tokens)

    def _is_displacing(self, line: Line, more: int, tokens: int) -> bool:
        """Whether others have to go that `more` of `line` can wait. Raises QueueFull where they may not."""
        queued, waiting = self.queued, self._arriving_tokens + self._waiting_tokens
        requests, surplus = self.excess(queued + more, waiting + tokens, self._free)
        if not (requests or surplus):
            return False
        if self._may_displace(line, more, tokens):
            return True
        seconds = self.retry_after()
        self._sent_away += seconds
        many = f"{queued} requests" if requests else f"{waiting} prompt tokens"
        raise QueueFull(f"{many} are waiting already.", seconds)

    def _may_displace(self, line: Line, more: int, tokens: int) -> bool:
        """Whether there is a line so much longer that it stays the longer one, or one of a later class."""
        own, (priority, _) = self._count(line), line
        if tokens * 2 > self.max_tokens:  # it would send away most of what waits
            return False
        return any(
            count >= more if other > priority else other == priority and count >= own + 2 * more
            for (other, _), count in (self._arriving + self._waiting).items()
        )

    def _check_deadlines(self, sequences: Many[Sequence], now: float) -> None:
        first = sequences[0]
        limits = [limit - now for limit in (first.queue_deadline, first.deadline) if limit is not None]
        wait = self.expected_wait(len(sequences), first.line)
        if limits and wait > min(limits):
            text = f"The wait would be about {wait:.0f} s, longer than the request may take."
            raise TooLate(text, _whole_seconds(wait - min(limits)))

    def retry_after(self) -> int:
        """Seconds until the next place will have been given out, and all who stay away could have had one: by Little's
        law they are as many as there were seconds told in a second. So no more ask again than there are places for,
        and answers have the time that refusing takes."""
        given, passed = self._measured
        return _whole_seconds(max(passed, self._sent_away) / given) if given > 0 else 1


def _whole_seconds(seconds: float) -> int:
    return min(LONGEST_RETRY, max(1, math.ceil(seconds)))
