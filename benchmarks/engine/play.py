"""A scheduler on a virtual clock: requests arrive, steps take what a model of their cost says, nothing is computed.

Looks at nothing in a sequence, so that the schedulers of other checkouts can be played, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence as Many
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from bdh_batch.engine.completion import Completion
from bdh_batch.messages import Delta, Outcome, SamplingParams
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Prefix, Sequence, Times

PARAMS = SamplingParams()


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and of what it does."""

    step: float = 0.001
    decode: float = 0.0003
    prefill: float = 0.0001
    copy: float = 0.0005

    def of(self, decodes: int, prefill_tokens: int, copies: float) -> float:
        return self.step + self.decode * decodes + self.prefill * prefill_tokens + self.copy * copies


@dataclass(frozen=True)
class Request:
    at: float
    tenant: str
    priority: int
    prompt: Many[int]
    completion_tokens: int


class Silent:
    """No text, and no client."""

    stopped = False
    found: str | None = None
    held = ""
    unfinished = False

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def put(self, index: int, delta: Delta) -> None:
        pass


@dataclass
class Response:
    """What came of a request: when its tokens did, in seconds."""

    request: Request
    times: list[float]
    ended: bool = False

    @property
    def wait(self) -> float:
        return self.times[0] - self.request.at


class Play:
    """A scheduler, a virtual clock, and requests that arrive.

    Args:
        shares: whether requests keep their tenants and priorities.
        batches_of: where a whole batch has to end before the next begins, how many it has.
    """

    def __init__(self, scheduler: Scheduler, cost: Cost, shares: bool = True, batches_of: int | None = None) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self.responses: list[Response] = []
        self.computed = 0  # prompt tokens
        self.steps: list[float] = []  # seconds
        self._cost = cost
        self._shares = shares
        self._batches_of = batches_of
        self._arrivals: list[tuple[float, int, Request, Callable[[Response], None] | None]] = []
        self._order = count()
        self._open: dict[Sequence, tuple[Response, Callable[[Response], None] | None]] = {}

    def ask(self, request: Request, then: Callable[[Response], None] | None = None) -> None:
        """`then` is called when it has ended."""
        heappush(self._arrivals, (request.at, next(self._order), request, then))

    def leave(self) -> None:
        """All clients leave."""
        self._arrivals.clear()
        self.scheduler.abort([*self._open])

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        while (self._arrivals or self.scheduler.has_work) and not until():
            self._admit()
            self._anticipate()
            step = self.scheduler.plan(self.now)
            if step is None:
                self.now = max(self.now, self._arrivals[0][0])
                continue
            seconds = self._cost.of(step.decodes, step.prefill_tokens, len(step.plan.copies))
            self.now += seconds
            self.steps.append(seconds)
            self.computed += step.prefill_tokens
            drawn = Outcome([1 if segment.sampling else None for segment in step.plan.segments])
            for sequence, delta in self.scheduler.commit(step, drawn, self.now):
                self._take(sequence, delta)

    def _anticipate(self) -> None:
        """Lets time pass, as the worker does, while the scheduler waits for a tenant."""
        anticipation = getattr(self.scheduler, "anticipation", None)  # other checkouts may have none
        while anticipation is not None and (until := anticipation.until(self.now)) > self.now:
            self.now = min(until, self._arrivals[0][0]) if self._arrivals else until
            self._admit()

    def _admit(self) -> None:
        taken = 0
        if self._batches_of is not None and self.scheduler.has_work:
            return
        while self._arrivals and self._arrivals[0][0] <= self.now and taken != self._batches_of:
            _, _, request, then = heappop(self._arrivals)
            sequence = self._sequence(request)
            self._open[sequence] = Response(request, []), then
            self.responses.append(self._open[sequence][0])
            self.scheduler.submit([sequence])
            taken += 1

    def _take(self, sequence: Sequence, delta: Delta) -> None:
        response, then = self._open[sequence]
        response.times += [self.now] * len(delta.tokens)
        if delta.finish_reason is not None:
            response.ended = True
            del self._open[sequence]
            if then is not None:
                then(response)

    def _sequence(self, request: Request) -> Sequence:
        silent = Silent()
        return Sequence(
            id="",
            completion=Completion(request.prompt, request.completion_tokens, PARAMS, silent),
            client=Client(silent),
            prefix=Prefix(request.tenant if self._shares else ""),
            times=Times(arrived=request.at),
            tenant=request.tenant if self._shares else "",
            priority=request.priority if self._shares else 0,
        )


def mean(values: Many[float]) -> float:
    return sum(values) / len(values)


def quantiles(values: Many[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": round(ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))], 4) for q in (50, 90, 99)}
