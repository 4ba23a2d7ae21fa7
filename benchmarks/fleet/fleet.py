"""Many engines, ingress processes, clients and failures on one virtual clock."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

from bdh_batch.messages import GenerationRequest
from bdh_batch.settings import Settings
from benchmarks.fleet.engine import TOKEN, Engine, Gained
from benchmarks.fleet.load import Chats, Conversation, conversations
from benchmarks.fleet.streams import RULES, Ingress, Stream, View

RETRY = 1.0  # seconds: the retry-after of a 503


@dataclass(frozen=True)
class Fleet:
    """A fleet, its load and its failures; times in seconds of the virtual clock.

    Args:
        rate: requests a second, of all clients together.
        seconds: after which no client says anything more; what has arrived is computed to its end.
        warm: seconds at the beginning whose requests are in no figure but those of lost work.
        failures_per_hour: of each replica.
        detected: seconds until an ingress knows that an engine is lost.
        restarted: seconds until it is there again, with an empty cache.
        heartbeat: seconds between two heartbeats, in which an engine says how many requests it has.
        begins: when the first client may come; the figures count from there.
        sticky: whether all turns of a conversation come to one ingress; else each comes to any.
    """

    replicas: int
    rate: float
    seconds: float
    warm: float = 0.0
    ingresses: int = 1
    rule: str = "affinity"
    sticky: bool = True
    failures_per_hour: float = 0.0
    detected: float = 1.0
    restarted: float = 30.0
    heartbeat: float = 1.0
    max_failovers: int = Settings().engine.max_failovers
    chats: Chats = field(default_factory=Chats)
    seed: int = 1
    begins: float = 0.0


class Simulation:
    """Plays a fleet to its end.

    Args:
        make: makes an engine, with an empty cache.
    """

    def __init__(self, fleet: Fleet, make: Callable[[], Engine]) -> None:
        self.fleet = fleet
        self.now = fleet.begins
        self.streams: list[Stream] = []  # all that have ended
        self.failed: list[Stream] = []
        self.open: dict[int, Stream] = {}
        self.engines: list[Engine | None] = [make() for _ in range(fleet.replicas)]
        self.failures = self.refused = 0
        self.gone = 0  # tokens that engines had computed which were lost since, of all requests
        self._make = make
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order, self._keys = count(), count()
        self._draw, self._chance = random.Random(f"{fleet.seed} fleet"), random.Random(f"{fleet.seed} failures")
        self.ingresses = [
            Ingress(fleet.replicas, RULES[fleet.rule](self._draw), fleet.max_failovers, lambda: self.now)
            for _ in range(fleet.ingresses)
        ]
        self._conversations = conversations(fleet.chats, fleet.rate, fleet.seed)
        self._of: dict[int, tuple[Conversation, Ingress]] = {}  # by the key of the stream

    def run(self) -> None:
        self._next_conversation()
        self._next_failure()
        for number in range(self.fleet.replicas):
            self._in(self._draw.uniform(0, self.fleet.heartbeat), self._beat, number)
        while self._events:
            self.now, _, act, arguments = heappop(self._events)
            act(*arguments)

    @property
    def _over(self) -> bool:
        return self.now >= self.fleet.begins + self.fleet.seconds

    def _in(self, seconds: float, act: Callable[..., None], *arguments: Any) -> None:
        self._at(self.now + seconds, act, *arguments)

    def _at(self, moment: float, act: Callable[..., None], *arguments: Any) -> None:
        heappush(self._events, (moment, next(self._order), act, arguments))

    # Clients

    def _next_conversation(self) -> None:
        at, conversation = next(self._conversations)
        if at < self.fleet.seconds:
            self._at(self.fleet.begins + at, self._begin_conversation, conversation)

    def _begin_conversation(self, conversation: Conversation) -> None:
        self._next_conversation()
        self._say(conversation, self._any_ingress())

    def _any_ingress(self) -> Ingress:
        return self._draw.choice(self.ingresses)

    def _say(self, conversation: Conversation, ingress: Ingress) -> None:
        if not self._over:
            ingress = ingress if self.fleet.sticky else self._any_ingress()
            self._ask(conversation, ingress, conversation.next(), self.now)

    def _ask(self, conversation: Conversation, ingress: Ingress, request: GenerationRequest, arrived: float) -> None:
        if not ingress.ready:
            self.refused += 1
            self._in(RETRY, self._ask, conversation, ingress, request, arrived)
            return
        stream = Stream(next(self._keys), request, arrived, self._send, self._on_failed)
        self.open[stream.key] = stream
        self._of[stream.key] = conversation, ingress
        ingress.add(stream)

    def _close(self, stream: Stream) -> tuple[Conversation, Ingress]:
        stream.ended = True
        del self.open[stream.key]
        conversation, ingress = self._of.pop(stream.key)
        ingress.ended(stream)
        return conversation, ingress

    def _on_failed(self, stream: Stream) -> None:
        """Its client gives up."""
        self._close(stream)
        self.failed.append(stream)

    # Engines

    def _send(self, stream: Stream, view: View) -> None:
        view.add(stream)
        engine = self.engines[view.number]
        if engine is None:
            return  # and nobody knows yet
        engine.submit(stream.key, stream.request, [TOKEN] * stream.tokens, self.now)
        stream.taken()
        if engine.done is None:
            self._at(self.now, self._begin, view.number)
        else:
            self._at(engine.done, self._finish, view.number, engine)

    def _begin(self, number: int) -> None:
        engine = self.engines[number]
        if engine is None or engine.done is not None:
            return
        engine.begin(self.now)
        if engine.done is not None:
            self._at(engine.done, self._finish, number, engine)

    def _finish(self, number: int, engine: Engine) -> None:
        if self.engines[number] is not engine or engine.done != self.now:
            return  # it was lost, or ends its steps at another time
        for gained in engine.finish():
            self._take(gained, self.now)
        self._begin(number)

    def _take(self, gained: Gained, at: float) -> None:
        stream = self.open[gained.key]
        if gained.tokens and stream.gained(gained.tokens, at):
            self._of[stream.key][1].has_token(stream)
        if gained.ended:
            stream.work.add(gained.computed, gained.cached, lost=False)
            conversation, ingress = self._close(stream)
            self.streams.append(stream)
            pause = conversation.heard([TOKEN] * stream.tokens)
            if pause is not None:
                self._in(pause, self._say, conversation, ingress)

    def _beat(self, number: int) -> None:
        engine = self.engines[number]
        for ingress in self.ingresses if engine is not None else ():
            assert engine is not None
            ingress.views[number].report(engine.load, engine.prompt_tokens)
        if not self._over:
            self._in(self.fleet.heartbeat, self._beat, number)

    # Failures

    def _next_failure(self) -> None:
        each_second = self.fleet.failures_per_hour * self.fleet.replicas / 3600
        if each_second and not self._over:
            self._in(self._chance.expovariate(each_second), self._fail)

    def _fail(self) -> None:
        if self._over:
            return
        self._next_failure()
        number = self._chance.randrange(self.fleet.replicas)
        if (engine := self.engines[number]) is None:
            return
        self.failures += 1
        gained, at, lost = engine.lose(self.now)
        for some in gained:
            self._take(some, at)
        self.gone += engine.computed
        self.engines[number] = None
        suspects = {self.open[each.key].request.origin.id for each in lost if each.suspect}
        for each in lost:
            stream = self.open[each.key]
            stream.work.add(each.computed, each.cached, lost=True)
            stream.waits = True
        for ingress in self.ingresses:
            ingress.views[number].in_step = suspects
        self._in(self.fleet.detected, self._detect, number)
        self._in(max(self.fleet.detected, self.fleet.restarted), self._restart, number)

    def _detect(self, number: int) -> None:
        for ingress in self.ingresses:
            ingress.lost(number)

    def _restart(self, number: int) -> None:
        self.engines[number] = self._make()
        for ingress in self.ingresses:
            ingress.connected(number)


def quantile(ordered: list[float], percent: float) -> float | None:
    """Of values in ascending order; None where there are none."""
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))] if ordered else None


def seconds_of(values: Iterator[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    found = {f"p{q}": quantile(ordered, q) for q in (50, 90, 99)}
    found["mean"] = sum(ordered) / len(ordered) if ordered else None
    return {name: None if value is None else round(value, 5) for name, value in found.items()}


def play(fleet: Fleet, make: Callable[[], Engine]) -> Mapping[str, Any]:
    """The figures of a fleet: times in seconds, work in tokens."""
    began = time.process_time()
    simulation = Simulation(fleet, make)
    simulation.run()
    assert not simulation.open, "every request has ended"
    measured = [stream for stream in simulation.streams if stream.arrived >= fleet.begins + fleet.warm]
    works = [stream.work for stream in simulation.streams + simulation.failed]
    prompts = sum(len(stream.request.prompts[0].tokens) for stream in measured)
    generated = sum(stream.tokens for stream in measured)
    return {
        "requests": len(measured),
        "failed": len(simulation.failed),
        "refused": simulation.refused,
        "first_token_s": seconds_of(stream.first - stream.arrived for stream in measured if stream.first is not None),
        "between_tokens_s": seconds_of(
            (stream.last - stream.first) / (stream.tokens - 1)
            for stream in measured
            if stream.first is not None and stream.tokens > 1
        ),
        "prompt_tokens": prompts,
        "computed_share_of_prompts": round(
            (sum(stream.work.computed for stream in measured) - generated + len(measured)) / prompts, 4
        ),
        "failures": simulation.failures,
        "resumed": sum(work.losses for work in works),
        "lost_tokens": sum(work.lost for work in works),
        "recomputed_tokens": sum(work.recomputed for work in works),
        "recomputed_share": round(sum(work.recomputed for work in works) / sum(work.computed for work in works), 6),
        "pause_s": seconds_of(pause for stream in simulation.streams for pause in stream.pauses),
        "virtual_seconds": round(simulation.now, 1),
        "processor_seconds": round(time.process_time() - began, 1),
    }
