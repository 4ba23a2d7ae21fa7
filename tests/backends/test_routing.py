"""Requests go to the engine with the least to do, as far as a front end can know it."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from bdh_batch.backends.outstanding import PROMPT_TOKENS, Outstanding
from bdh_batch.backends.replica import Replica
from bdh_batch.backends.routing import BLOCK, IMBALANCE, Routing, least_loaded
from bdh_batch.backends.wire import Gain, Heartbeat, Start
from bdh_batch.errors import BDHError
from bdh_batch.messages import GenerationRequest, Origin, Prompt, SamplingParams
from tests.backends.engines import FakeEngine, empty, engines, read, until

REQUEST = GenerationRequest(Origin("r-1"), [Prompt(b"a prompt")], 5, sampling=SamplingParams(), seeds=(7,))


class Unread:
    """A reader of what nobody wants."""

    id = "r-1"
    tenant = ""
    has_token = False

    def started(self, replica: Replica, error: BDHError | None) -> None: ...

    def gained(self, gain: Gain) -> None: ...


def begin(replica: Replica) -> int:
    return replica.start(Unread(), lambda stream: Start.of(stream, REQUEST, []))


async def test_load_is_what_was_reported_and_what_has_begun_and_ended_since(tmp_path: Path) -> None:
    async with engines(FakeEngine(tmp_path / "one.sock")) as backend:
        # Nothing is awaited from here on, so that the engine's own heartbeats do not come between.
        replica = backend.replicas["one"]

        def load(tenant: str) -> float:
            outstanding = replica.outstanding
            return outstanding.load_for(tenant, Outstanding.share_of(tenant, [outstanding]))

        streams = [begin(replica) for _ in range(2)]
        replica.take(Heartbeat(sequences=7, prompt_tokens=0))  # of which two are of this front end
        assert (load("somebody"), load("")) == (3.5, 7.0)
        streams += [begin(replica) for _ in range(3)]
        assert (load("somebody"), load("")) == (5.0, 10.0)
        replica.outstanding.expect(2 * PROMPT_TOKENS)
        assert (load("somebody"), load("")) == (7.0, 12.0)
        replica.take(Heartbeat(sequences=10, prompt_tokens=PROMPT_TOKENS))
        for stream in streams[:4]:
            replica.abort(stream)
        assert (load("somebody"), load("")) == (4.0, 7.0)
        streams = [streams[4], begin(replica)]
        replica.take(Heartbeat(sequences=0, prompt_tokens=0))  # sent before the engine has received them
        assert (load("somebody"), load("")) == (1.0, 2.0)
        for stream in streams:
            replica.abort(stream)
        assert (load("somebody"), load("")) == (0.0, 0.0)


async def test_an_engine_says_what_is_to_be_computed_of_its_prompts(tmp_path: Path) -> None:
    one = FakeEngine(tmp_path / "one.sock", slots=1)
    async with engines(one) as backend:
        long = replace(REQUEST, prompts=[Prompt(b"x" * 2000)])
        running = await backend.generate(long)
        waiting = await backend.generate(long)
        assert one.port.state().prompt_tokens > 2000  # of both, the second whole
        await read(running, empty(long))
        await read(waiting, empty(long))
        await until(lambda: one.port.state() == Heartbeat(sequences=0, prompt_tokens=0))


@dataclass
class Engine:
    """As all front ends know it between two heartbeats."""

    address: str
    outstanding: Outstanding = field(default_factory=Outstanding)

    def report(self, sequences: int, prompt_tokens: int = 0) -> None:
        self.outstanding.report(sequences, prompt_tokens)


def some(count: int) -> list[Engine]:
    return [Engine(f"{number}") for number in range(count)]


def test_front_ends_that_know_the_same_choose_different_engines_of_the_least_loaded() -> None:
    chosen = Counter[str]()
    for front_end in range(64):
        busy, *idle = some(5)
        busy.report(3)
        for each in idle:
            each.report(2)
        engine = Routing(random.Random(front_end)).choose([busy, *idle], REQUEST)
        assert engine is not None
        chosen[engine.address] += 1
    assert chosen.keys() == {"1", "2", "3", "4"}
    assert max(chosen.values()) < 32, chosen


def test_a_prompt_goes_where_its_prefix_is_until_that_engine_has_too_much_to_do() -> None:
    routing, ready = Routing(random.Random(1)), some(4)
    begun = replace(REQUEST, prompts=[Prompt(b"x" * BLOCK)])
    first = routing.choose(ready, begun)
    assert first is not None
    first.report(IMBALANCE)  # of others
    later = replace(REQUEST, prompts=[Prompt(b"x" * BLOCK + b"and more")])
    assert all(routing.choose(ready, later) is first for _ in range(8))
    first.report(IMBALANCE + 1)
    other = routing.choose(ready, later)
    assert other is not first
    assert routing.choose(ready, later) is other  # it has computed it, too
    assert routing.choose([], later) is None


def test_a_tenant_does_not_have_all_of_its_streams_where_its_prefix_is() -> None:
    routing, ready = Routing(random.Random(1)), some(2)
    wanted = replace(REQUEST, origin=Origin("r-1", tenant="ann"), prompts=[Prompt(b"x" * BLOCK)])
    for engine in ready:  # a flood of others, beside which a few streams are no imbalance
        for _ in range(50):
            engine.outstanding.begin("flood")
    where = Counter[str]()
    for _ in range(24):
        chosen = routing.choose(ready, wanted)
        assert chosen is not None
        chosen.outstanding.begin("ann")
        where[chosen.address] += 1
    assert min(where.values()) >= 8, where


def test_a_tenants_streams_of_other_front_ends_count_where_this_one_has_none_of_it() -> None:
    ready = some(2)
    ready[1].outstanding.begin("ann")
    ready[0].report(18)
    ready[1].report(10)
    share = Outstanding.share_of("ann", (each.outstanding for each in ready))
    assert [each.outstanding.load_for("ann", share) for each in ready] == [18, 10]
    for tenant in ("bob", "ann", "bob"):
        ready[0].outstanding.begin(tenant)
    assert Outstanding.share_of("ann", (each.outstanding for each in ready)) == 0.5
    assert ready[0].outstanding.streams_of("ann", 0.5) == 1 + 18 * (1 + 0.5) / (3 + 1)
    assert Outstanding.share_of("ann", ()) == 0
    (chosen,) = {least_loaded(ready, "ann", random.Random(number)).address for number in range(8)}
    assert chosen == "1"


def test_long_prompts_are_spread_and_weigh_as_much_as_is_to_be_computed_of_them() -> None:
    routing, ready = Routing(random.Random(1)), some(4)
    long = [replace(REQUEST, prompts=[Prompt(bytes([number]) * 8 * PROMPT_TOKENS)]) for number in range(4)]
    where = [routing.choose(ready, request) for request in long]
    assert {each.address for each in where if each is not None} == {"0", "1", "2", "3"}  # none has another stream
    ready[0].report(1, 4 * PROMPT_TOKENS)  # half of it is computed
    short = Counter[str]()
    for _ in range(8):
        engine = routing.choose(ready, REQUEST)
        assert engine is not None
        engine.outstanding.begin("")
        short[engine.address] += 1
    assert short["0"] >= 4, short
    for each in ready:
        each.report(0)
    again = [routing.choose(ready, replace(each, prompts=[*each.prompts])) for each in long * 4]
    assert again == where * 4  # what is cached costs nothing
