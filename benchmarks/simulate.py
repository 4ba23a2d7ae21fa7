"""Plays loads against a model of step time on a virtual clock, with the scheduler as it is and with simpler ones.

    python -m benchmarks.simulate                           # 100,000 requests of a generated load, and all scenarios
    python -m benchmarks.simulate --against ../before       # the same with the scheduler of another checkout beside it
    python -m benchmarks.simulate --without                 # and what fails without each of the scheduler's guards
    python -m benchmarks.simulate --trace trace.jsonl       # what a server with scheduler.trace_file was asked
    python -m benchmarks.simulate --requests 2000 --load 0.9 --out /tmp

Policies: `fair` is the server's, and `before` that of the other checkout. `fcfs` serves in order of arrival, and shares
and preempts nothing. `static` also waits for a whole batch to end before the next begins. Prints JSON, and writes it
with a plot to --out.

In a generated load one tenant asks for most, in bursts, and others for little; many prompts begin with one of a few
stems. The scenarios are a lone tenant beside a flood, two floods, and a long prompt beside streams, with the costs of a
step on two cores of a CPU. Nothing here depends on how fast the machine is, but for `wall_seconds`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence as Many
from dataclasses import asdict, dataclass, replace
from functools import partial
from heapq import heappop, heappush
from itertools import count, pairwise
from pathlib import Path

from bdh_batch.engine.completion import Completion
from bdh_batch.engine.trace import BLOCK
from bdh_batch.messages import Delta, Outcome, SamplingParams
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Prefix, Sequence, Times

POLICIES = ("fair", "fcfs", "static")
GOOD = 5.0  # seconds to the first token within which a response counts for goodput
PARAMS = SamplingParams()


@dataclass(frozen=True)
class Cost:
    """Seconds of a step, and of what it does."""

    step: float = 0.001
    decode: float = 0.0003
    prefill: float = 0.0001
    copy: float = 0.0005

    def of(self, decodes: int, prefill_tokens: int, copies: int) -> float:
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

    Looks at nothing in a sequence, so that the schedulers of other checkouts can be played, too.

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


# A generated load, or a recorded one


def generate(count: int, load: float, cost: Cost, slots: int, seed: int) -> list[Request]:
    """A load that is `load` times what full batches without any sharing could carry."""
    draw = random.Random(seed)
    stems = [[draw.randrange(256) for _ in range(draw.choice((64, 200, 600)))] for _ in range(20)]
    prompt, completion = 180, 40
    each = prompt * cost.prefill + completion * (cost.decode + cost.step / slots)
    rate, now, requests = load / each, 0.0, []
    for number in range(count):
        burst = number // 1000 % 4 == 0
        now += draw.expovariate(rate * (2.0 if burst else 0.8))
        key = "flood" if draw.random() < (0.95 if burst else 0.5) else f"key {draw.randrange(20)}"
        tail = [draw.randrange(256) for _ in range(1 + int(draw.expovariate(1 / 60)))]
        stem = draw.choice(stems) if draw.random() < 0.5 else []
        length = 1 + int(draw.expovariate(1 / completion))
        requests.append(Request(now, key, 0, [*stem, *tail], length))
    return requests


def replay(file: Path) -> list[Request]:
    """The requests of a trace. Their tokens are made up, such that they begin alike where those of the trace did."""
    events = [json.loads(line) for line in file.read_text().splitlines()]
    lengths = {event["place"]: event["generated"] for event in events if event["event"] == "end"}
    submitted = [event for event in events if event["event"] == "submit" and lengths.get(event["place"])]
    begin = submitted[0]["now"] if submitted else 0.0
    return [
        Request(event["now"] - begin, event["tenant"], event["priority"], _tokens(event), lengths[event["place"]])
        for event in submitted
    ]


def _tokens(event: Mapping[str, object]) -> list[int]:
    blocks, length = event["prompt"], event["prompt_tokens"]
    assert isinstance(blocks, list)
    assert isinstance(length, int)
    return [int(block, 16) + at & 0xFFFFFFFF for block in blocks for at in range(BLOCK)][:length]


def simulate(name: str, requests: Many[Request], cost: Cost, slots: int, prefill: int, host: int) -> dict[str, object]:
    """Runs all of `requests` under one policy."""
    fair = name == "fair"
    policy = Policy(host, target_step=0.03, cache_prefixes=True) if fair else Policy(min_shared=1 << 30)
    play = Play(Scheduler(slots, prefill, policy), cost, fair, slots if name == "static" else None)
    began = time.perf_counter()
    for request in requests:
        play.ask(request)
    play.run()
    play.scheduler.check()
    assert all(response.ended for response in play.responses), "every request was answered"
    return figures(play.responses, play.now) | {
        "prompt_tokens_computed": play.computed,
        "preemptions": play.scheduler.counts.preemptions,
        "wall_seconds": round(time.perf_counter() - began, 1),
    }


def figures(responses: Many[Response], seconds: float) -> dict[str, object]:
    by_tenant = defaultdict(list)
    for response in responses:
        by_tenant[response.request.tenant].append(response.wait)
    waits = [response.wait for response in responses]
    good = sum(len(response.times) for response in responses if response.wait <= GOOD)
    greedy = max(by_tenant, key=lambda tenant: len(by_tenant[tenant]))
    small = [wait for tenant, line in by_tenant.items() if tenant != greedy for wait in line]
    return {
        "seconds": round(seconds, 1),
        "tokens_per_s": round(sum(len(response.times) for response in responses) / seconds, 1),
        "goodput_tokens_per_s": round(good / seconds, 1),
        "first_token_s": quantiles(waits),
        "first_token_s_of_small_keys": quantiles(small or waits),
        "mean_wait_of_small_keys_over_greedy": round(mean(small or waits) / mean(by_tenant[greedy]), 3),
    }


def mean(values: Many[float]) -> float:
    return sum(values) / len(values)


def quantiles(values: Many[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": round(ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))], 4) for q in (50, 90, 99)}


# Scenarios, each with what `benchmarks.serving` measures over HTTP

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


SCENARIOS: Mapping[str, Callable[..., dict[str, object]]] = {
    "lone tenant beside 300": partial(lone_tenant, 300, 256),
    "lone tenant beside 300, 150 slots": partial(lone_tenant, 300, 150),
    "two floods that fit": partial(two_floods, 1024),
    "two floods, 64 slots": partial(two_floods, 64),
    "two floods, 64 slots and 64 on the host": partial(two_floods, 64, host_slots=64, max_running=120),
    "two floods, a larger model": partial(two_floods, 1024, cost=SLOW),
    "two floods, a GPU": partial(two_floods, 1024, cost=GPU),
    "8,192 tokens beside 32 streams": partial(long_prompt, 32, "streams"),
    "8,192 tokens of another tenant beside 32 streams": partial(long_prompt, 32, "other"),
    "1,024 tokens beside 256 streams": partial(long_prompt, 256, "streams", 1024),
    "prompts on end, of weight 8, beside 32 streams": partial(prompts_on_end, 32, 8.0),
    "prompts beside 32 tenants with a stream": partial(many_tenants, 32),
    "prompts beside 60 tenants with a stream": partial(many_tenants, 60),
}
GUARDED: Mapping[str, Many[str]] = {  # the guards of `policy.Guards`, and the scenarios that are worse without
    "alternate": ["prompts on end, of weight 8, beside 32 streams"],
    "finished": ["lone tenant beside 300"],
    "least_share": ["1,024 tokens beside 256 streams", "two floods, a GPU"],
    "least_width": ["two floods, a larger model"],
    "little": ["two floods, a GPU"],
}


def play_scenarios(names: Iterable[str] = tuple(SCENARIOS), **policy: object) -> dict[str, dict[str, object]]:
    return {name: SCENARIOS[name](**policy) for name in names}


def play_without(guard: str) -> dict[str, dict[str, object]]:
    """The guard's scenarios, without it."""
    from bdh_batch.scheduler.policy import UNGUARDED, Guards  # other checkouts may have none

    guards = replace(Guards(), **{guard: getattr(UNGUARDED, guard)})
    return play_scenarios(GUARDED[guard], guards=guards)


# The command


def plot(report: Mapping[str, Mapping[str, object]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        "first_token_s",
        "first_token_s_of_small_keys",
        "mean_wait_of_small_keys_over_greedy",
        "goodput_tokens_per_s",
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(16, 4))
    for axis, panel in zip(axes, panels, strict=True):
        values = [report[name][panel] for name in report]
        bars = [value["p99"] if isinstance(value, dict) else value for value in values]
        axis.bar(list(report), bars)
        axis.set_title(f"{panel}{', p99' if isinstance(values[0], dict) else ''}", fontsize=9)
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def parse(argv: Many[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="a file of scheduler.trace_file, instead of a generated load")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--load", type=float, default=0.95, help="of what full batches could carry")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--host", type=int, default=64, help="slots in host memory, for the server's policy")
    parser.add_argument("--prefill", type=int, default=256, help="most prompt tokens in a step")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--against", type=Path, help="another checkout, whose scheduler is played beside this one's")
    text = "guards of the scheduler, all if none is named: plays the scenarios that are worse without them"
    parser.add_argument("--without", nargs="*", choices=GUARDED, metavar="GUARD", help=text)
    parser.add_argument("--print-only", action="store_true", help="write no files; the report goes to stdout")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON and the plot")
    return parser.parse_args(argv)


def in_order(requests: Many[Request]) -> Iterator[Request]:
    yield from sorted(requests, key=lambda request: request.at)


def measure(chosen: argparse.Namespace) -> dict[str, dict[str, dict[str, object]]]:
    cost = Cost()
    if chosen.trace is not None:
        requests = replay(chosen.trace)
    else:
        requests = generate(chosen.requests, chosen.load, cost, chosen.slots, chosen.seed)
    requests = [replace(request, at=max(0.0, request.at)) for request in in_order(requests)]
    found = {}
    for name in chosen.policies:
        found[name] = simulate(name, requests, cost, chosen.slots, chosen.prefill, chosen.host)
        print(name, json.dumps(found[name]), file=sys.stderr)
    assert all(math.isfinite(float(str(result["seconds"]))) for result in found.values())
    return {"policies": found, "scenarios": play_scenarios()}


def measure_other(checkout: Path, argv: Many[str]) -> dict[str, dict[str, dict[str, object]]]:
    """What this file says of the scheduler of `checkout`. Run by its path, so that the package is that one's."""
    kept = [each for at, each in enumerate(argv) if each != "--against" and (not at or argv[at - 1] != "--against")]
    command = [sys.executable, __file__, *kept, "--policies", "fair", "--print-only"]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    report: dict[str, dict[str, dict[str, object]]] = json.loads(
        subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    )
    return report


def main(argv: Many[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    chosen = parse(argv)
    measured = measure(chosen)
    if chosen.print_only:
        json.dump(measured, sys.stdout)
        return
    policies, schedulers = measured["policies"], {"fair": measured["scenarios"]}
    if chosen.without is not None:
        for guard in chosen.without or GUARDED:
            schedulers[f"without {guard}"] = play_without(guard)
    if chosen.against is not None:
        before = measure_other(chosen.against, argv)
        policies["before"], schedulers["before"] = before["policies"]["fair"], before["scenarios"]
    report = {
        "command": f"python -m benchmarks.simulate {' '.join(argv)}".strip(),
        "machine": {"system": platform.platform(), "python": platform.python_version()},
        "requests": chosen.requests if chosen.trace is None else str(chosen.trace),
        "cost": asdict(Cost()),
        "policies": policies,
        "scenarios": {"cost": asdict(CPU), "target_step_s": TARGET, **schedulers},
    }
    (chosen.out / "simulate.json").write_text(json.dumps(report, indent=2) + "\n")
    plot(policies, chosen.out / "simulate.png")


if __name__ == "__main__":
    main()
