"""What a load takes beyond single machines: spares, ingress processes, traffic, and what losing a replica costs.

A replica that is lost takes its states along. Its streams are resumed on the others, which compute their tokens again:
`recomputed_tokens` are those that a stream has read in the middle of its completion, on average. No prompt is cached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from bdh_batch.plan.costs import Load
from bdh_batch.plan.flags import Flags
from bdh_batch.system.sizes import size_text

FRAMES = 123_000.0  # SSE frames a second that one process writes; amd-epyc-2-threads/suite/frontend.json, `ahead`
# Bytes between ingress and engine, by backends/wire.py: of a token that an engine returns, alone in its message, and of
# one of a prompt.
RETURNED_BYTES, PROMPT_BYTES = 54, 4
SHORT_OF = 0.001  # share of the time in which more replicas may be away than there are spares
DAY = 86_400.0  # seconds
GBIT = 1e9 / 8  # bytes


@dataclass(frozen=True)
class Faults(Flags):
    """How often replicas are lost, for how long, and what lies between machines.

    `moved` is the share of completions whose state is saved for, and read by, another machine.
    """

    failures_per_day: float = 0.1  # of a replica
    detect_seconds: float = 5.0  # as engine.heartbeat_seconds; a process that ends is known at once
    restart_seconds: float = 60.0
    network_gbit: float = 25.0  # of a machine, each way
    moved: float = 0.0

    def __post_init__(self) -> None:
        for name in ("failures_per_day", "detect_seconds", "restart_seconds"):
            self.refuse_unless(name, 0 <= getattr(self, name) < math.inf, "at least 0, and finite")
        self.refuse_unless("network_gbit", 0 < self.network_gbit < math.inf, "above 0, and finite")
        self.refuse_unless("moved", 0 <= self.moved <= 1, "from 0 to 1")
        away = self.failures_per_day * self.away_seconds
        self.refuse_unless(
            "failures_per_day", away < DAY / 2, "so few that a replica is there more than half of the time"
        )

    @property
    def away_seconds(self) -> float:
        """For which a replica is lost."""
        return self.detect_seconds + self.restart_seconds

    @property
    def unavailability(self) -> float:
        """Share of the time for which a replica is away."""
        away = self.failures_per_day * self.away_seconds
        return away / (DAY + away)


@dataclass(frozen=True)
class Need:
    """What one machine was sized to do; seconds, and shares of its time."""

    machines: int
    busy: float
    step_seconds: float
    prompt_token_seconds: float
    state_bytes: int


@dataclass(frozen=True)
class FleetSizing:
    """Times in seconds, work in tokens; what is of a loss is of one replica's, with all others there."""

    replicas: int  # with the spares
    spares: int
    ingress_processes: int
    streams_lost: int
    recomputed_tokens: int
    recompute_seconds: float  # of one machine's time
    pause_seconds: float  # of a stream that is resumed, mean
    catch_up_seconds: float | None  # until the others are as busy as before; None where there are no others
    failures_per_day: float
    recomputed_tokens_per_day: float
    recomputed_share: float  # of the time of all machines
    ingress_bytes_per_s: float  # between ingress processes and engines, both ways
    state_bytes_per_s: float  # of moved states, all machines together: written and read
    state_link_share: float  # of a machine's link, of the busier way
    move_seconds: float  # of one state over a link
    move_pays_from: int  # tokens from which on a state is moved sooner than computed
    faults: Mapping[str, float]

    def rows(self) -> dict[str, str]:
        """As lines of text, by their names."""
        faults = self.faults
        catch_up = "" if self.catch_up_seconds is None else f"; the others catch up in {self.catch_up_seconds:,.3g} s"
        return {
            "replicas": f"{self.replicas:,}, of which {self.spares:,} to spare: fewer than are needed in "
            f"{SHORT_OF:.1%} of the time at most, at {faults['failures_per_day']:g} failures a day of each",
            "ingress processes": f"{self.ingress_processes:,}, {FRAMES:,.0f} frames/s each at best",
            "losing one, streams": f"{self.streams_lost:,} are resumed, after {self.pause_seconds:,.2f} s on average, "
            f"of which {faults['detect_seconds']:g} until the loss is known",
            "losing one, tokens": f"{self.recomputed_tokens:,} computed again: {self.recompute_seconds:,.2f} s of one "
            f"machine{catch_up}",
            "losses in a day": f"{self.failures_per_day:,.3g}; {self.recomputed_tokens_per_day:,.0f} tokens computed "
            f"again, {100 * self.recomputed_share:.2g}% of the machines' time",
            "between machines": f"{size_text(round(self.ingress_bytes_per_s))}/s of tokens; "
            f"{size_text(round(self.state_bytes_per_s))}/s of states, {self.state_link_share:.1%} of each link",
            "moving a state": f"{1e3 * self.move_seconds:,.2f} ms at {faults['network_gbit']:g} Gbit/s, sooner than "
            f"computing {self.move_pays_from:,} tokens or more",
        }


def size_fleet(load: Load, faults: Faults, need: Need) -> FleetSizing:
    """For machines that were sized for `load`."""
    spares = spares_for(need.machines, faults.unavailability)
    replicas = need.machines + spares
    lost = -(-load.streams // replicas)
    read = load.prompt_tokens + load.answer_tokens / 2  # by a stream, halfway through its completion
    recomputed = round(lost * read)
    work = recomputed * need.prompt_token_seconds
    others = replicas - 1
    free = 1 - need.busy
    completions = load.streams * load.rate / load.answer_tokens
    states = completions * faults.moved * need.state_bytes
    link = faults.network_gbit * GBIT
    move = need.state_bytes / link
    losses = replicas * faults.failures_per_day
    return FleetSizing(
        replicas=replicas,
        spares=spares,
        ingress_processes=ingress_processes(load, replicas),
        streams_lost=lost,
        recomputed_tokens=recomputed,
        recompute_seconds=work,
        pause_seconds=pause(faults, need, lost, read, others),
        catch_up_seconds=work / (others * free) if others else None,
        failures_per_day=losses,
        recomputed_tokens_per_day=losses * recomputed,
        recomputed_share=faults.failures_per_day * work / DAY,
        ingress_bytes_per_s=load.streams * load.rate * RETURNED_BYTES + completions * load.prompt_tokens * PROMPT_BYTES,
        state_bytes_per_s=2 * states,
        state_link_share=states / replicas / link,
        move_seconds=move,
        move_pays_from=math.ceil(move / need.prompt_token_seconds),
        faults=asdict(faults),
    )


def ingress_processes(load: Load, replicas: int) -> int:
    """As many as write the tokens, and with several replicas one more, so that one may be lost, too."""
    writing = math.ceil(load.streams * load.rate / (load.utilization * FRAMES))
    return writing + (replicas > 1)


def pause(faults: Faults, need: Need, lost: int, read: float, others: int) -> float:
    """Mean seconds for which a stream of a lost replica has no token: the loss is noticed, then those that come to one
    other replica are computed one after the other, in the time that this has left. A lone replica restarts first."""
    each = read * need.prompt_token_seconds
    if not others:
        return faults.away_seconds + (lost + 1) / 2 * each + need.step_seconds
    beside = math.ceil(lost / others)
    return faults.detect_seconds + (beside + 1) / 2 * each / (1 - need.busy) + need.step_seconds


def spares_for(machines: int, unavailability: float) -> int:
    """The fewest spares with which more replicas than these are away in `SHORT_OF` of the time at most."""
    fewest, enough = -1, 1
    while tail(machines + enough, unavailability, enough) > SHORT_OF:
        fewest, enough = enough, 2 * enough
    while enough - fewest > 1:
        middle = (fewest + enough) // 2
        if tail(machines + middle, unavailability, middle) > SHORT_OF:
            fewest = middle
        else:
            enough = middle
    return enough


def tail(n: int, p: float, k: int) -> float:
    """The probability of more than `k` of `n`, each with probability `p` by itself."""
    if p == 0 or k >= n:
        return 0.0
    mean, width = n * p, math.sqrt(n * p * (1 - p))
    if k < mean - 10 * width:
        return 1.0
    last = min(n, k + 50 + int(20 * width))  # what lies beyond is nothing beside it
    odds, each = math.log(p) - math.log1p(-p), _log_chance(n, p, k + 1)
    total = 0.0
    for count in range(k + 1, last + 1):
        total += math.exp(each)
        each += math.log(n - count) - math.log(count + 1) + odds if count < n else 0.0
    return min(1.0, total)


def _log_chance(n: int, p: float, k: int) -> float:
    """The logarithm of the probability of exactly `k` of `n`."""
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + k * math.log(p) + (n - k) * math.log1p(-p)
