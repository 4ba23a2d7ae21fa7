"""What steps cost, and how long requests waited, by a server's own trace. Knows nothing of clients."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy

from bdh_batch.messages import Copy
from benchmarks.engine.play import Cost
from benchmarks.fleet.engine import copied

HELD_UP = 10.0  # times the median error
ROUNDS = 4

ENOUGH = 30  # steps, to draw from

Kind = tuple[bool, bool]  # whether it had prompts, and copies
Like = tuple[int, bool, bool]  # and how many sequences decoded


class Taken(NamedTuple):
    """A step that a server made."""

    at: float  # seconds, when it was planned
    seconds: float
    decodes: int
    prompt_tokens: int
    copies: float  # whole states

    @property
    def kind(self) -> Kind:
        return bool(self.prompt_tokens), bool(self.copies)

    def by(self, cost: Cost) -> float:
        """The seconds that it should take."""
        return cost.of(self.decodes, self.prompt_tokens, self.copies)


def steps(lines: Iterable[str]) -> Iterator[Taken]:
    """The steps of a trace. Where work was left after one, its seconds last until the next one was planned."""
    last: Mapping[str, Any] | None = None
    present: set[int] = set()
    left: int | None = None  # requests after the last step's ends, once others were submitted
    for line in lines:
        event = json.loads(line)
        if event["event"] == "submit":
            left = len(present) if left is None else left
            present.add(event["place"])
        elif event["event"] == "end":
            present.discard(event["place"])
        elif event["event"] == "step":
            if last is not None:
                busy = len(present) if left is None else left
                yield _taken(last, event["now"] - last["now"] if busy else last["seconds"])
            last, left = event, None


def _taken(event: Mapping[str, Any], seconds: float) -> Taken:
    copies = copied([Copy(*copy) for copy in event["copies"]])
    return Taken(event["now"], seconds, event["decodes"], sum(event["prefill"].values()), copies)


def first_tokens(lines: Iterable[str]) -> Iterator[tuple[float, float]]:
    """Of each request of a trace that has ended: when it arrived, and the seconds until its first token."""
    arrived: dict[int, float] = {}
    first: dict[int, float] = {}
    for line in lines:
        event = json.loads(line)
        if event["event"] == "submit":
            arrived[event["place"]] = event["arrived"]
        elif event["event"] == "step":
            first.update((int(place), event["now"] + event["seconds"]) for place in event["prefill"])
        elif event["event"] == "end":
            begun = arrived.pop(event["place"])
            yield begun, first.pop(event["place"]) - begun


def fitted(taken: Sequence[Taken]) -> Cost:
    """The costs by least squares, none of them below 0. Steps that were held up, by another program say, would move
    them far: in each round those are left out that are off by many times the usual error of their kind."""
    kept, cost = taken, _least_squares(taken)
    for _ in range(ROUNDS):
        kinds: dict[Kind, list[float]] = {}
        for each in taken:
            kinds.setdefault(each.kind, []).append(abs(each.seconds - each.by(cost)))
        most = {kind: HELD_UP * median(errors) for kind, errors in kinds.items()}
        kept = [each for each in taken if abs(each.seconds - each.by(cost)) <= most[each.kind]]
        cost = _least_squares(kept)
    return cost


def _least_squares(taken: Sequence[Taken]) -> Cost:
    seconds = numpy.array([each.seconds for each in taken])
    features = numpy.array([[1.0, each.decodes, each.prompt_tokens, each.copies] for each in taken])
    costs, used = numpy.zeros(features.shape[1]), list(range(features.shape[1]))
    while used:
        found, *_ = numpy.linalg.lstsq(features[:, used], seconds, rcond=None)
        if found.min() >= 0:
            costs[used] = found
            break
        del used[int(found.argmin())]
    return Cost(*(float(each) for each in costs))


class Calibrated:
    """The costs of steps that were measured. One step takes what least squares say, times what one of the measured
    steps like it took of that, drawn at random; those that were held up are among them."""

    def __init__(self, taken: Sequence[Taken], seed: int = 0) -> None:
        self.cost = fitted(taken)
        self.spent = 0.0  # seconds of all steps that were asked for
        self._draw = random.Random(seed)
        self._shares: dict[Kind | Like, list[float]] = {}
        for each in taken:
            if (expected := each.by(self.cost)) > 0:
                for group in (each.kind, (each.decodes, *each.kind)):
                    self._shares.setdefault(group, []).append(each.seconds / expected)

    def of(self, decodes: int, prefill_tokens: int, copies: float) -> float:
        kind = bool(prefill_tokens), bool(copies)
        shares = self._shares.get((decodes, *kind), [])
        if len(shares) < ENOUGH:
            shares = self._shares.get(kind, [1.0])
        seconds = self.cost.of(decodes, prefill_tokens, copies) * self._draw.choice(shares)
        self.spent += seconds
        return seconds
