"""Scenarios on a virtual clock, each with what `benchmarks.server.serving` measures over HTTP."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence as Many
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from benchmarks.engine.play import Cost, Play, Request, Response, quantiles

CPU = Cost(step=0.0015, decode=0.00036, prefill=0.00016, copy=0.0001)
SLOW = replace(CPU, decode=0.001)  # a larger model
GPU = Cost(step=0.02, decode=0.00005, prefill=0.00001, copy=0.0001)  # what a step costs by itself is most of it
TARGET = 0.025  # seconds: the default of scheduler.target_step_ms
PREFILL = 256  # tokens: the default of scheduler.prefill_tokens
ENDLESS = 100_000


def server(slots: int, cost: Cost = CPU, **policy: object) -> Play:
    """One that has served some requests before, so that it has learned what a step costs."""
    play = Play(Scheduler(slots, PREFILL, Policy(target_step=TARGET, **policy)), cost)  # type: ignore[arg-type]
    draw, play.now = random.Random(0), -60.0
    for number in range(100):
        play.ask(Request(-60.0 + 0.1 * number, "before", 0, tokens(draw, draw.randrange(8, 400)), 8))
    play.run()
    play.responses.clear()
    play.steps.clear()
    return play


def tokens(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(256) for _ in range(length)]


def lone_tenant(flood: int, slots: int, singles: int = 200, **policy: object) -> dict[str, object]:
    """One request at a time of 256 tokens, alone and beside another tenant's flood that never ends."""
    alone, beside = (singles_beside(many, slots, singles, policy) for many in (0, flood))
    return {
        "alone_s": quantiles(alone),
        "beside_s": quantiles(beside),
        "ratio": round(quantiles(beside)["p50"] / quantiles(alone)["p50"], 3),
    }


def singles_beside(flood: int, slots: int, singles: int, policy: Mapping[str, object]) -> list[float]:
    draw, play = random.Random(2), server(slots, CPU, **policy)
    waits: list[float] = []

    def again(at: float, tenant: str) -> None:
        if tenant == "flood":
            request = Request(at, tenant, 0, tokens(draw, draw.randrange(32, 96)), draw.randrange(16, 64))
        else:
            request = Request(at, tenant, 0, tokens(draw, 256), 8)
        play.ask(request, lambda response: ended(response))

    def ended(response: Response) -> None:
        tenant = response.request.tenant
        if tenant == "lone":
            waits.append(response.wait)
        again(play.now + draw.uniform(0.001, 0.01), tenant)  # a client's time between two requests

    for _ in range(flood):
        again(0.0, "flood")
    again(2.0, "lone")
    play.run(lambda: len(waits) >= singles)
    return waits


def two_floods(slots: int, requests: int = 500, cost: Cost = CPU, **policy: object) -> dict[str, object]:
    """The first tenant's requests come first, and ask for longer responses; what counts is tokens while both wait."""
    draw, play = random.Random(3), server(slots, cost, **policy)
    for tenant, scale, at in (("first", 2, 0.0), ("second", 1, 0.3)):
        for _ in range(requests):
            prompt = tokens(draw, draw.randrange(32, 96))
            play.ask(Request(at, tenant, 0, prompt, scale * draw.randrange(16, 64)))
    play.run()
    floods = [[r for r in play.responses if r.request.tenant == tenant] for tenant in ("first", "second")]
    waiting = min(max(r.times[0] for r in flood) for flood in floods)
    unfinished = min(sorted(r.times[-1] for r in flood)[int(0.8 * requests)] for flood in floods)
    return {
        "seconds": round(play.now, 2),
        "jain_while_both_wait": jain([served(flood, 0.3, waiting) for flood in floods]),
        "jain_while_both_are_unfinished": jain([served(flood, 0.3, unfinished) for flood in floods]),
        "preemptions": play.scheduler.counts.preemptions,
    }


def served(flood: Many[Response], begin: float, end: float) -> int:
    """Tokens generated in this time, and of the prompts whose first token came in it."""
    generated = sum(begin < at <= end for r in flood for at in r.times)
    return generated + sum(len(r.request.prompt) for r in flood if begin < r.times[0] <= end)


def jain(amounts: Many[float]) -> float:
    """Jain's index: 1 where all have the same, 1/n where one has all."""
    return round(sum(amounts) ** 2 / (len(amounts) * sum(amount**2 for amount in amounts)), 4)


def long_prompt(streams: int, tenant: str, length: int = 8192, **policy: object) -> dict[str, object]:
    """Gaps between the tokens of streams that decode, without and beside a long prompt of `tenant`."""
    draw, play = random.Random(1), server(2 * streams, CPU, **policy)
    for _ in range(streams):
        play.ask(Request(0.0, "streams", 0, tokens(draw, 64), ENDLESS))
    ended: list[Response] = []
    play.ask(Request(3.0, tenant, 0, tokens(draw, length), 1), ended.append)
    play.run(lambda: bool(ended))
    begin, end = 3.0, play.now
    gaps = [(a, b - a) for r in play.responses[:streams] for a, b in pairwise(r.times)]
    without = quantiles([gap for at, gap in gaps if 1.0 <= at < begin])
    beside = quantiles([gap for at, gap in gaps if begin <= at < end])
    return {
        "without_s": without,
        "beside_s": beside,
        "ratio_of_p99": round(beside["p99"] / without["p99"], 3),
        "prompt_s": round(end - begin, 3),
    }


def prompts_on_end(streams: int, weight: float, **policy: object) -> dict[str, object]:
    """Gaps between the tokens of streams, while a tenant of this weight asks for one prompt after another."""
    draw, play = random.Random(4), server(2 * streams, CPU, weights={"prompts": weight}, **policy)
    for _ in range(streams):
        play.ask(Request(0.0, "streams", 0, tokens(draw, 64), ENDLESS))
    ended: list[Response] = []

    def again(response: Response) -> None:
        ended.append(response)
        play.ask(Request(play.now, "prompts", 0, tokens(draw, 256), 1), again)

    for _ in range(8):
        play.ask(Request(3.0, "prompts", 0, tokens(draw, 256), 1), again)
    play.run(lambda: play.now > 10.0)
    gaps = [b - a for r in play.responses[:streams] for a, b in pairwise(r.times) if a >= 3.0]
    return {"gap_s": quantiles(gaps), "prompts": len(ended)}


def many_tenants(tenants: int, length: int = 256, **policy: object) -> dict[str, object]:
    """Gaps between the tokens of streams of a tenant each, while prompts of others come, and the latter's waits."""
    draw, play = random.Random(5), server(3 * tenants, CPU, **policy)
    for number in range(tenants):
        play.ask(Request(0.0, f"stream {number}", 0, tokens(draw, 64), ENDLESS))
    for number in range(60):
        play.ask(Request(3.0 + number / 8, f"prompt {number}", 0, tokens(draw, length), 8))
    play.run(lambda: all(response.ended for response in play.responses[tenants:]) and play.now > 10.0)
    gaps = [b - a for r in play.responses[:tenants] for a, b in pairwise(r.times) if a >= 3.0]
    return {"gap_s": quantiles(gaps), "first_token_s": quantiles([r.wait for r in play.responses[tenants:]])}


def earlier_priority(slots: int, **policy: object) -> dict[str, object]:
    """Sequences of a later priority hold all states that there may be; then as many as half of them come that go before
    them, and are more than can run at a time."""
    draw, play = random.Random(6), server(slots, CPU, host_slots=3 * slots, max_running=4 * slots, **policy)
    for _ in range(4 * slots):
        play.ask(Request(0.0, "later", 1, tokens(draw, 32), 400))
    for _ in range(2 * slots):
        play.ask(Request(4.0, "earlier", 0, tokens(draw, 64), 200))
    play.run()
    earlier = [r for r in play.responses if r.request.tenant == "earlier"]
    return {
        "first_token_s": quantiles([r.wait for r in earlier]),
        "until_the_last_ended_s": round(max(r.times[-1] for r in earlier) - 4.0, 2),
        "seconds": round(play.now, 2),
        "preemptions": play.scheduler.counts.preemptions,
    }


SCENARIOS: Mapping[str, Callable[..., dict[str, object]]] = {
    "lone tenant beside 300": partial(lone_tenant, 300, 256),
    "lone tenant beside 300, 150 slots": partial(lone_tenant, 300, 150),
    "two floods that fit": partial(two_floods, 1024),
    "two floods, 64 slots": partial(two_floods, 64),
    "two floods, 64 slots and 64 on the host": partial(two_floods, 64, host_slots=64, max_running=120),
    "two floods, a larger model": partial(two_floods, 1024, cost=SLOW),
    "two floods, a GPU": partial(two_floods, 1024, cost=GPU),
    "an earlier priority, 32 slots and 96 on the host": partial(earlier_priority, 32),
    "8,192 tokens beside 32 streams": partial(long_prompt, 32, "streams"),
    "8,192 tokens of another tenant beside 32 streams": partial(long_prompt, 32, "other"),
    "1,024 tokens beside 256 streams": partial(long_prompt, 256, "streams", 1024),
    "prompts on end, of weight 8, beside 32 streams": partial(prompts_on_end, 32, 8.0),
    "prompts beside 32 tenants with a stream": partial(many_tenants, 32),
    "prompts beside 60 tenants with a stream": partial(many_tenants, 60),
}
GUARDED: Mapping[str, Many[str]] = {  # the guards of `policy.Guards`, and the scenarios that are worse without
    "awaits": ["lone tenant beside 300"],
    "alternate": ["prompts on end, of weight 8, beside 32 streams"],
    "finished": ["lone tenant beside 300"],
    "least_share": ["1,024 tokens beside 256 streams", "two floods, a GPU"],
    "least_width": ["two floods, a larger model"],
    "little": ["two floods, a GPU"],
    "exchanges": ["two floods, 64 slots and 64 on the host"],
    "again": ["an earlier priority, 32 slots and 96 on the host"],
    "later_apart": ["an earlier priority, 32 slots and 96 on the host"],
}
UNGUARDED: Mapping[str, Any] = {
    "awaits": 0.0,
    "alternate": False,
    "finished": 0.0,
    "least_share": 0.0,
    "least_width": 0,
    "little": inf,
    "exchanges": False,
    "again": False,
    "later_apart": False,
}


def play_scenarios(names: Iterable[str] = tuple(SCENARIOS), **policy: object) -> dict[str, dict[str, object]]:
    return {name: SCENARIOS[name](**policy) for name in names}


def play_without(guard: str) -> dict[str, dict[str, object]]:
    """The guard's scenarios, without it."""
    from bdh_batch.scheduler.policy import Guards  # other checkouts may have none

    return play_scenarios(GUARDED[guard], guards=replace(Guards(), **{guard: UNGUARDED[guard]}))
