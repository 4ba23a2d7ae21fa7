"""A runner without a model, an outbox and a text without a client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from bdh_batch.engine.completion import Completion
from bdh_batch.messages import (
    Copy,
    Delta,
    Neurons,
    NeuronsAsked,
    Outcome,
    Plan,
    SamplingParams,
    Segment,
    latent_positions,
)
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.sequence import Client, Prefix, Sequence
from bdh_batch.scheduler.watched import WatchedSequence


def next_token(slot_tokens: list[int]) -> int:
    """What the fake model says after these tokens."""
    return (sum(slot_tokens[::2]) * 31 + sum(slot_tokens) * 7 + len(slot_tokens)) % 251


class FakeRunner:
    """Keeps each slot's tokens as its state, and checks that they come in order."""

    def __init__(self) -> None:
        self.slots: dict[int, list[int]] = {}
        self.fail_next = False
        self.copies = 0
        self._begun: dict[tuple[int, int], tuple[int, list[int]]] = {}
        self.computed = 0  # tokens
        self._steady: dict[int, list[Segment]] = {}  # of the last steady plan, without tokens

    def run(self, plan: Plan) -> Outcome:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the device is on fire")
        for copy in plan.copies:
            self._copy(copy)
        for slot in plan.releases:
            self.slots.pop(slot, None)
        self.computed += plan.tokens
        if plan.steady:
            same = [replace(segment, start=0, tokens=()) for segment in plan.segments]
            assert plan.tokens == len(same)
            assert self._steady.get(plan.steady, same) == same, "what is steady stays the same"
            self._steady = {plan.steady: same}
        assert len({segment.slot for segment in plan.segments}) == len(plan.segments)
        pooled = {
            at: [float(sum(segment.tokens)), float(len(segment.tokens))]
            for at, segment in enumerate(plan.segments)
            if segment.pool
        }
        assert plan.watches == any(segment.watch for segment in plan.segments)
        neurons = {at: fake_neurons(segment) for at, segment in enumerate(plan.segments) if segment.watch}
        return Outcome([self._segment(segment) for segment in plan.segments], pooled=pooled, neurons=neurons)

    def _copy(self, copy: Copy) -> None:
        """Checks that the parts of a copy come in order, and that what it reads stays as it is meanwhile."""
        state = list(self.slots[copy.source])
        if copy.begin:  # else one that has begun may have been given up
            assert self._begun.pop((copy.source, copy.target)) == (copy.begin, state)
        if copy.end < copy.parts:
            self._begun[copy.source, copy.target] = copy.end, state
            self.slots[copy.target] = [-1]  # which is no state
        else:
            self.slots[copy.target] = state
            self.copies += not copy.moves
        if copy.moves:
            self.slots[copy.source] = [-1]

    def _segment(self, segment) -> int | None:  # type: ignore[no-untyped-def]
        if segment.start == 0:
            self.slots[segment.slot] = []
        known = self.slots[segment.slot]
        assert len(known) == segment.start
        assert segment.tokens
        assert len(segment.tokens) == 1 or not latent_positions(segment.tokens), "a latent step comes alone"
        known.extend(segment.tokens)
        return next_token(known) if segment.sampling else None


def fake_neurons(segment: Segment) -> list[Neurons]:
    """Each token's position, in place of the neurons that it fired."""
    watched = range(segment.watch_from, len(segment.tokens))
    assert watched, "what is watched is there"
    return [Neurons(segment.tokens[at], segment.start + at, b"", b"", bytes(segment.watch)) for at in watched]


class FakeText:
    """Shows each token as a character; `stop_after` tokens it has met a stop string."""

    held = ""
    unfinished = False

    def __init__(self, stop_after: int | None = None, fail_after: int | None = None) -> None:
        self.stopped = False
        self.found: str | None = None
        self._stop_after = stop_after
        self._fail_after = fail_after
        self._tokens = 0

    def push(self, token: int) -> str:
        self._tokens += 1
        if self._tokens == self._fail_after:
            raise ValueError("no such character")
        self.stopped = self._tokens == self._stop_after
        return chr(0x100 + token)

    def flush(self) -> str:
        return ""


class FakeOutbox:
    def __init__(self) -> None:
        self.deltas: list[Delta] = []

    def put(self, index: int, delta: Delta) -> None:
        self.deltas.append(delta)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]


class FakeObserver:
    def __init__(self) -> None:
        self.steps = self.tokens = self.ends = 0

    def stepped(self, step: Step, seconds: float) -> None:
        self.steps += 1

    def looked(self, active: Iterable[float]) -> None:
        """Nobody asks here how sparsely a model fires."""

    def gained(self, sequences: Iterable[Sequence]) -> None:
        self.tokens += len(list(sequences))

    def finished(self, sequence: Sequence, now: float) -> None:
        self.ends += 1


def make_sequence(
    prompt: list[int],
    max_tokens: int,
    text: FakeText | None = None,
    name: str = "r",
    outbox: FakeOutbox | None = None,
    tenant: str = "",
    priority: int = 0,
    queue_deadline: float | None = None,
    deadline: float | None = None,
    completion: Completion | None = None,
    watches: NeuronsAsked | None = None,
) -> Sequence:
    whole = watches is not None and watches.prompt
    made = completion or Completion(prompt, max_tokens, SamplingParams(), text or FakeText(), watches_prompt=whole)
    kind = Sequence if watches is None else partial(WatchedSequence, asked=watches)
    return kind(
        id=name,
        completion=made,
        client=Client(outbox or FakeOutbox()),
        latents=latent_positions(prompt),
        prefix=Prefix(tenant),
        tenant=tenant,
        priority=priority,
        queue_deadline=queue_deadline,
        deadline=deadline,
    )


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """What an undisturbed run generates."""
    known = list(prompt)
    for _ in range(count):
        known.append(next_token(known))
    return known[len(prompt) :]
