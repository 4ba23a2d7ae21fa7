"""What steps cost, and how long requests waited, by a server's own trace. Knows nothing of clients."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy

from bdh_batch.messages import Copy
from benchmarks.engine.play import Cost
from benchmarks.fleet.engine import copied

Kind = tuple[bool, bool]


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
    """Of each request of a trace that has ended: when it was submitted, and the seconds until its first token."""
    submitted: dict[int, float] = {}
    first: dict[int, float] = {}
    for line in lines:
        event = json.loads(line)
        if event["event"] == "submit":
            submitted[event["place"]] = event["now"]
        elif event["event"] == "step":
            first.update((int(place), event["now"] + event["seconds"]) for place in event["prefill"])
        elif event["event"] == "end":
            begun = submitted.pop(event["place"])
            yield begun, first.pop(event["place"]) - begun


def fitted(taken: Sequence[Taken]) -> Cost:
    """The costs by least squares, none of them below 0."""
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
    """The costs of steps that were measured. One step takes what least squares say, and by so much more or less as one
    of the measured steps of its kind, drawn at random."""

    def __init__(self, taken: Sequence[Taken], seed: int = 0) -> None:
        self.cost = fitted(taken)
        self._least = min(each.seconds for each in taken)
        self._draw = random.Random(seed)
        self._others: dict[Kind, list[float]] = {}
        for each in taken:
            likely = self.cost.of(each.decodes, each.prompt_tokens, each.copies)
            self._others.setdefault(each.kind, []).append(each.seconds - likely)

    def of(self, decodes: int, prefill_tokens: int, copies: float) -> float:
        others = self._others.get((bool(prefill_tokens), bool(copies)), [0.0])
        return max(self._least, self.cost.of(decodes, prefill_tokens, copies) + self._draw.choice(others))
