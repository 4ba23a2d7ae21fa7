"""Fleets on a virtual clock: nothing is lost on the way, work adds up, and the same seed gives the same figures."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from bdh_batch.backends import failover
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.messages import GenerationRequest
from bdh_batch.settings import PrefixCache, Scheduler as SchedulerOptions, Settings
from benchmarks import ROOT
from benchmarks.engine.play import Cost
from benchmarks.fleet.calibrated import Calibrated, Taken, first_tokens, fitted, steps
from benchmarks.fleet.engine import TOKEN, Engine, Lost, scheduler_of
from benchmarks.fleet.fleet import Fleet, Simulation, play
from benchmarks.fleet.load import Chats, Conversation
from benchmarks.fleet.page import TABLE, TABLES, rewritten
from benchmarks.fleet.streams import RULES, Ingress, Stream, View, Work
from benchmarks.report import RESULTS

COST = Cost(step=0.005, decode=0.003, prefill=0.001, copy=0.002)
CHATS = Chats(stems=4, instructions=64, message=16, answer=12, pause=1.0)
STATE_BYTES = 2**20


def engine(cached: bool = True) -> Engine:
    chosen = Settings(prefix_cache=PrefixCache(enabled=cached))
    return Engine(scheduler_of(chosen, BDHConfig(), 16, STATE_BYTES), COST)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    log = logging.getLogger(failover.__name__)
    before = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(before)


FLEETS = st.builds(
    Fleet,
    replicas=st.integers(1, 4),
    rate=st.floats(0.5, 40.0),
    seconds=st.just(12.0),
    ingresses=st.integers(1, 3),
    rule=st.sampled_from(sorted(RULES)),
    sticky=st.booleans(),
    failures_per_hour=st.sampled_from([0.0, 300.0, 1200.0]),
    detected=st.sampled_from([0.0, 0.5, 3.0]),
    restarted=st.floats(0.5, 6.0),
    chats=st.just(CHATS),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=30, deadline=None)
@given(fleet=FLEETS, cached=st.booleans())
def test_every_request_ends_once_and_all_work_is_accounted_for(fleet: Fleet, cached: bool) -> None:
    simulation = Simulation(fleet, partial(engine, cached))
    simulation.run()
    ended = simulation.streams + simulation.failed
    assert simulation.open == {}
    assert len({stream.key for stream in ended}) == len(ended)
    for ingress in simulation.ingresses:
        assert not ingress.failover.waiting
        assert not any(view.readers for view in ingress.views)
    for stream in simulation.streams:
        work, prompt = stream.work, len(stream.request.prompts[0].tokens)
        assert stream.tokens == stream.request.max_tokens
        assert work.computed + work.cached == prompt + stream.tokens - 1 + work.lost
        assert work.lost - work.cached <= work.recomputed <= work.lost
        assert bool(work.losses) or work.recomputed == 0
    computed = simulation.gone + sum(each.computed for each in simulation.engines if each is not None)
    assert computed == sum(stream.work.computed for stream in ended)
    assert fleet.failures_per_hour or (simulation.failures, simulation.refused, simulation.failed) == (0, 0, [])


def test_the_same_seed_gives_the_same_figures() -> None:
    fleet = Fleet(3, rate=30.0, seconds=12.0, failures_per_hour=900.0, ingresses=2, restarted=3.0, chats=CHATS)
    first, again, other = (
        {**play(each, engine), "processor_seconds": 0} for each in (fleet, fleet, replace(fleet, seed=2))
    )
    assert first == again != other
    assert first["failures"] > 0
    assert first["resumed"] > 0


def test_affinity_computes_fewer_prompt_tokens_than_other_rules() -> None:
    fleet = Fleet(4, rate=8.0, seconds=30.0, warm=5.0, chats=CHATS)
    shares = {rule: play(replace(fleet, rule=rule), engine)["computed_share_of_prompts"] for rule in RULES}
    assert shares["affinity"] < 0.7 * min(share for rule, share in shares.items() if rule != "affinity"), shares


def test_ingresses_that_each_remember_their_own_requests_compute_more() -> None:
    fleet = Fleet(4, rate=8.0, seconds=30.0, warm=5.0, chats=CHATS, ingresses=4)
    sticky, spread = (play(replace(fleet, sticky=each), engine)["computed_share_of_prompts"] for each in (True, False))
    assert sticky < spread


def test_work_by_hand() -> None:
    work = Work()
    work.add(100, 20, lost=True)  # a state of 120 tokens is lost
    work.add(30, 50, lost=True)  # another engine had 50 of them cached, and came to 80
    work.add(150, 0, lost=False)
    assert (work.computed, work.cached, work.lost, work.losses) == (280, 70, 200, 2)
    assert work.recomputed == 30 + 120
    assert work.computed + work.cached == 150 + work.lost


def test_a_lost_engine_says_what_it_had() -> None:
    request = Conversation(0, CHATS, random.Random(1)).next()
    alone, prompt = engine(), len(request.prompts[0].tokens)
    alone.submit(7, request, [], 0.0)
    alone.begin(0.0)
    assert alone.lose(0.001)[2] == [Lost(7, 0, 0, suspect=True)]  # in its first step, which it did not survive
    alone = engine()
    alone.submit(7, request, [TOKEN, TOKEN], 0.0)
    alone.begin(0.0)
    while not any(gained.tokens for gained in alone.finish()):
        alone.begin(alone.now)
    assert alone.lose(alone.now)[2] == [Lost(7, prompt + 2, 0, suspect=False)]


def some_streams(count: int, sent: list[tuple[int, int]]) -> list[Stream]:
    """Streams that add to `sent` which of them goes to which engine."""

    def send(stream: Stream, view: View) -> None:
        view.add(stream)
        sent.append((stream.key, view.number))

    requests = [Conversation(key, CHATS, random.Random(key)).next() for key in range(count)]
    return [Stream(key, request, 0.0, send, lambda stream: None) for key, request in enumerate(requests)]


def first_of_least_loaded(ready: Sequence[View], request: GenerationRequest) -> View | None:
    return min(ready, key=lambda view: view.outstanding.load_for("", 1.0), default=None)


def test_new_requests_go_to_other_engines_while_a_suspect_is_probed() -> None:
    """The server's failover, with engines that do nothing."""
    ingress, sent = Ingress(3, first_of_least_loaded, 2, lambda: 0.0), list[tuple[int, int]]()
    suspect, *others, last = some_streams(6, sent)
    ingress.add(suspect)
    suspect.taken()
    assert sent == [(0, 0)]
    ingress.views[0].in_step = {suspect.request.origin.id}
    ingress.lost(0)
    assert sent[1:] == [(0, 1)]  # alone in one of the others
    for each in others:
        ingress.add(each)
    assert sent[2:] == [(1, 2), (2, 2), (3, 2), (4, 2)]
    suspect.gained(1, 0.0)
    ingress.has_token(suspect)
    ingress.add(last)
    assert sent[-1] == (5, 1)


def test_what_another_loss_brings_back_without_a_token_is_not_sent_to_where_a_suspect_is_probed() -> None:
    """It may be another that crashes engines; then the suspect beside it would be blamed."""
    ingress, sent = Ingress(3, first_of_least_loaded, 2, lambda: 0.0), list[tuple[int, int]]()
    innocent, poison, another, begun = some_streams(4, sent)

    def lose(number: int, *in_step: Stream) -> None:
        ingress.views[number].in_step = {each.request.origin.id for each in in_step}
        ingress.lost(number)

    ingress.add(innocent)
    innocent.taken()
    lose(0, innocent)
    for each in (poison, another, begun):
        ingress.add(each)
        each.taken()
    begun.gained(1, 0.0)
    ingress.has_token(begun)
    assert sent == [(0, 0), (0, 1), (1, 2), (2, 2), (3, 2)]
    lose(2, poison)
    assert sent[5:] == [(3, 1)]
    innocent.gained(1, 0.0)
    ingress.has_token(innocent)
    assert sent[6:] == [(2, 1)]


def test_a_trace_says_how_long_steps_took_and_requests_waited() -> None:
    """A step lasts until the next one where work is left after it."""

    def step(now: float, seconds: float, decodes: int, prefill: dict[str, int], copies: list[list[int]]) -> Any:
        counts = {"decodes": decodes, "prefill": prefill, "copies": copies}
        return {"event": "step", "now": now, "seconds": seconds, **counts}

    events = [
        {"event": "submit", "now": -0.4, "arrived": -0.5, "place": 1},
        step(0.0, 0.5, 0, {"1": 7}, []),
        step(0.6, 0.5, 1, {}, [[0, 1, 0, 1, 2]]),
        {"event": "end", "now": 1.1, "place": 1},
        {"event": "submit", "now": 3.0, "arrived": 3.0, "place": 2},
        step(3.0, 0.4, 0, {"2": 5}, []),
        step(3.5, 0.3, 0, {"2": 1}, []),
        {"event": "end", "now": 3.8, "place": 2},
        step(4.0, 0.4, 0, {}, []),
    ]
    lines = [json.dumps(event) for event in events]
    assert [*steps(lines)] == [
        (0.0, pytest.approx(0.6), 0, 7, 0.0),
        (0.6, 0.5, 1, 0, 0.5),
        (3.0, pytest.approx(0.5), 0, 5, 0.0),
        (3.5, 0.3, 0, 1, 0.0),
    ]
    assert [*first_tokens(lines)] == [(-0.5, 1.0), (3.0, pytest.approx(0.8))]


def some_steps(count: int, noise: float) -> list[Taken]:
    draw = random.Random(1)
    shapes = [(draw.randrange(9), draw.choice([0, draw.randrange(200)]), draw.choice([0, 1])) for _ in range(count)]
    return [Taken(0.0, COST.of(*shape) + noise * draw.random(), *shape) for shape in shapes]


def test_costs_are_found_again_in_the_steps_that_they_make() -> None:
    made = some_steps(50, noise=0.0)
    assert asdict(fitted(made)) == pytest.approx(asdict(COST))
    assert [Calibrated(made).of(*each[2:]) for each in made] == pytest.approx([each.seconds for each in made])


def test_steps_that_were_held_up_move_no_cost() -> None:
    made = some_steps(200, noise=0.0001)
    held_up = [each._replace(seconds=each.seconds + 0.2) for each in made[::20]]
    found = fitted([*made, *held_up])
    assert asdict(found) == pytest.approx(asdict(fitted(made)), rel=0.01)


def test_no_cost_is_below_nothing() -> None:
    made = [
        each._replace(seconds=0.001 + 0.002 * each.decodes - 1e-6 * each.prompt_tokens) for each in some_steps(50, 0)
    ]
    found = fitted(made)
    assert (found.prefill, found.copy >= 0) == (0.0, True)
    assert found.decode == pytest.approx(0.002, rel=0.05)


def test_calibrated_steps_vary_as_the_measured_ones_did() -> None:
    made = some_steps(400, noise=0.01)
    costs = Calibrated(made)
    drawn = [costs.of(*each[2:]) for each in made for _ in range(20)]
    assert sum(drawn) / len(drawn) == pytest.approx(sum(each.seconds for each in made) / len(made), rel=0.02)
    assert max(drawn) - min(drawn) > 0.009


def test_the_page_has_the_figures_of_the_result() -> None:
    result = json.loads((RESULTS / "amd-epyc-2-threads" / "fleet.json").read_text())
    page = (ROOT / "docs" / "fleets.md").read_text()
    assert set(TABLES) <= set(result)
    assert {name for _, name, _ in TABLE.findall(page)} == set(TABLES)
    assert rewritten(page, result) == page, "run: python -m benchmarks.fleet.page"


@pytest.mark.parametrize("seed", range(4))
def test_steps_that_are_alike_are_the_same_one_by_one_and_at_once(seed: int) -> None:
    """Where steps are of no certain length: what the scheduler learns of their cost, it learns more slowly at once."""
    chosen = Settings(scheduler=SchedulerOptions(target_step_ms=0.0))
    fleet = Fleet(
        2, 4.0 * (1 + seed), 12.0, ingresses=2, failures_per_hour=900.0, restarted=3.0, chats=CHATS, seed=seed
    )

    def played(leaps: bool) -> list[tuple[Any, ...]]:
        simulation = Simulation(fleet, lambda: Engine(scheduler_of(chosen, BDHConfig(), 16, STATE_BYTES), COST, leaps))
        simulation.run()
        assert simulation.failures
        return [
            (s.key, s.tokens, s.work.computed, s.work.lost, pytest.approx(s.first), pytest.approx(s.last))
            for s in simulation.streams
        ]

    assert played(leaps=True) == played(leaps=False)
