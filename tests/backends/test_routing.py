"""Requests go to the engine with the least load, as far as a front end can know it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from bdh_batch.backends.replica import Replica
from bdh_batch.backends.routing import BLOCK, IMBALANCE, Routing
from bdh_batch.backends.wire import Gain, Heartbeat, Start
from bdh_batch.errors import BDHError
from bdh_batch.messages import GenerationRequest, Origin, Prompt, SamplingParams
from tests.backends.engines import FakeEngine, engines

REQUEST = GenerationRequest(Origin("r-1"), [Prompt(b"a prompt")], 5, sampling=SamplingParams(), seeds=(7,))


class Unread:
    """A reader of what nobody wants."""

    id = "r-1"
    has_token = False

    def started(self, replica: Replica, error: BDHError | None) -> None: ...

    def gained(self, gain: Gain) -> None: ...


def begin(replica: Replica) -> int:
    return replica.start(Unread(), lambda stream: Start.of(stream, REQUEST, []))


async def test_load_is_what_was_reported_and_what_has_begun_and_ended_since(tmp_path: Path) -> None:
    async with engines(FakeEngine(tmp_path / "one.sock")) as backend:
        # Nothing is awaited from here on, so that the engine's own heartbeats do not come between.
        replica = backend.replicas["one"]
        streams = [begin(replica) for _ in range(2)]
        replica.take(Heartbeat(running=5, waiting=2))  # of which two are of this front end
        assert replica.outstanding == 7
        streams += [begin(replica) for _ in range(3)]
        assert replica.outstanding == 10
        for stream in streams[:4]:
            replica.abort(stream)
        assert replica.outstanding == 6
        streams = [streams[4], begin(replica)]
        replica.take(Heartbeat(running=0, waiting=0))  # sent before the engine has received them
        assert replica.outstanding == 2
        for stream in streams:
            replica.abort(stream)
        assert replica.outstanding == 0


@dataclass
class Engine:
    """As all front ends know it between two heartbeats."""

    address: str
    outstanding: int


def test_front_ends_that_know_the_same_choose_different_engines_of_the_least_loaded() -> None:
    ready = [Engine("busy", 3), *(Engine(f"idle {number}", 2) for number in range(4))]
    chosen = Counter(
        engine.address
        for front_end in range(64)
        if (engine := Routing(random.Random(front_end)).choose(ready, REQUEST)) is not None
    )
    assert chosen.total() == 64
    assert chosen.keys() == {each.address for each in ready if each.outstanding == 2}
    assert max(chosen.values()) < 32, chosen


def test_a_prompt_goes_where_its_prefix_is_until_that_engine_has_too_much_to_do() -> None:
    routing, ready = Routing(random.Random(1)), [Engine(f"{number}", 0) for number in range(4)]
    begun = replace(REQUEST, prompts=[Prompt(b"x" * BLOCK)])
    first = routing.choose(ready, begun)
    assert first is not None
    first.outstanding = IMBALANCE
    later = replace(REQUEST, prompts=[Prompt(b"x" * BLOCK + b"and more")])
    assert all(routing.choose(ready, later) is first for _ in range(8))
    first.outstanding += 1
    other = routing.choose(ready, later)
    assert other is not first
    assert routing.choose(ready, later) is other  # it has computed it, too
    assert routing.choose([], later) is None
