"""Machines, slots and latencies for a load, and what binds.

A step of B streams takes, one after the other, its fixed part, the pass over B states, and the products; each of the
two is bound by memory or by computing, whichever takes longer. As many streams fit a machine as its memory holds states
of, and as the share of the time that may be used is enough for. `fleet.py` adds what it takes to run several.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bdh_batch.checkpoint.checkpoint import open_checkpoint
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.errors import ConfigError
from bdh_batch.plan.costs import Costs, Load, costs_of
from bdh_batch.plan.fleet import FRAMES, Faults, FleetSizing, Need, size_fleet
from bdh_batch.plan.machines import Machine, machine_of
from bdh_batch.system.sizes import size_text

MEMORY_SHARE = 0.9  # that weights and states may take; buffers and the runtime have the rest
# By benchmarks/results/amd-epyc-2-threads/suite/scheduler.json, where 1,024 decode.
PLANNING = 2.1e-6  # seconds a sequence and step
LABEL = 28  # characters

Seconds = dict[str, float]  # by resource


@dataclass(frozen=True)
class Sizing:
    """Times in seconds, sizes in bytes; shares of the time are of each machine, at `streams_per_machine`."""

    basis: str
    binds: str
    machines: int
    streams_per_machine: int
    most_streams_per_machine: int  # by each limit
    limits: Mapping[str, int]
    shares_of_time: Mapping[str, float]
    tokens_per_s: float
    prompt_tokens_per_s: float
    step_seconds: float
    gap_seconds: float  # mean, where no machine waits: what is left of the time makes streams faster than asked for
    first_token_seconds: float  # mean, with a free slot
    state_bytes: int
    weight_bytes: int
    suspend_seconds: float | None
    fleet: FleetSizing
    costs: Mapping[str, float]
    load: Mapping[str, object]
    machine: Mapping[str, object]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        load = self.load
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares_of_time.items())
        limits = ", ".join(f"{name} {limit:,}" for name, limit in self.limits.items())
        suspend = "" if self.suspend_seconds is None else f"; {1e3 * self.suspend_seconds:.1f} ms to the host or back"
        rows = {
            "basis": self.basis,
            "asked for": f"{load['streams']:,} streams at {load['rate']:g} tokens/s each; prompts of "
            f"{load['prompt_tokens']:,} tokens, completions of {load['answer_tokens']:,}",
            "assumed": f"{load['active_fraction']:.1%} of the neurons fire; no prompt is cached; window "
            f"{load['window'] or 'none'}; states in {load['state_dtype']}, weights in {load['dtype']}",
            "": "",
            "machines": f"{self.machines:,} x {self.machine['name']}",
            "slots on each": f"{self.streams_per_machine:,} of at most {self.most_streams_per_machine:,}",
            "what binds": self.binds,
            "streams that would fit, by": limits,
            "time of a machine": shares,
            "tokens/s in all": f"{self.tokens_per_s:,.0f}, and {self.prompt_tokens_per_s:,.0f} of prompts",
            "a step": f"{1e3 * self.step_seconds:.2f} ms",
            "between tokens, mean": f"{1e3 * self.gap_seconds:.2f} ms at full speed; "
            f"{1e3 / float(str(load['rate'])):.2f} are enough",
            "to the first token, mean": f"{1e3 * self.first_token_seconds:.1f} ms, where a slot is free",
            "state of a stream": size_text(self.state_bytes) + suspend,
            "weights": size_text(self.weight_bytes),
            "options that each needs": f"scheduler.max_running={self.streams_per_machine} "
            f"engine.state_memory={self.streams_per_machine * self.state_bytes}, and more of it for cached prefixes",
        }
        lines = [f"{name:<{LABEL}}{value}".rstrip() for name, value in rows.items()]
        return "\n".join([*lines, "", *(f"{name:<{LABEL}}{value}" for name, value in self.fleet.rows().items())])


class Planner:
    """Sizes machines for one model and load, by its costs on one machine."""

    def __init__(self, config: BDHConfig, machine: Machine, load: Load, faults: Faults | None = None) -> None:
        self._machine, self._load, self._faults = machine, load, faults or Faults()
        self.costs: Costs = costs_of(config, load, machine.skips_gates)
        self._bandwidth = machine.bandwidth * machine.bandwidth_share
        products = machine.flops_32 if load.dtype == "float32" else machine.flops_16
        self._products = products * machine.compute_share
        self._vector = machine.vector_flops * machine.compute_share

    def step(self, streams: int) -> Seconds:
        costs = self.costs
        state = longer(
            ("state bandwidth", streams * costs.state_traffic / self._bandwidth),
            ("compute", streams * costs.state_flops / self._vector),
        )
        products = longer(
            ("weights bandwidth", costs.weight_traffic / self._bandwidth),
            ("compute", streams * costs.product_flops / self._products),
        )
        return added(state, products, {"steps": self._machine.step_seconds + streams * PLANNING})

    def prompt(self) -> Seconds:
        """Of a token in it."""
        costs = self.costs
        return longer(
            ("state bandwidth", costs.prompt_traffic / self._bandwidth),
            ("compute", costs.prompt_flops / self._products),
        )

    def busy(self, streams: int) -> Seconds:
        """Of a second, by resource."""
        load = self._load
        prompts = streams * load.rate * load.prompt_tokens / load.answer_tokens
        return added(scaled(load.rate, self.step(streams)), scaled(prompts, self.prompt()))

    def limits(self) -> dict[str, int]:
        """Streams that a machine can serve, by what limits them."""
        costs = self.costs
        slots = int((MEMORY_SHARE * self._machine.memory - costs.weight_bytes) / costs.state_bytes)
        return {"state memory": max(0, slots), "time": self._in_time()}

    def _in_time(self) -> int:
        """The most that are not too busy: more streams take more time, if only to plan them."""
        if self._load.rate > self._load.utilization * FRAMES:
            return 0  # no process could write its tokens
        fits, over = 0, int(self._load.utilization / (self._load.rate * PLANNING)) + 1
        while over - fits > 1:
            middle = (fits + over) // 2
            if sum(self.busy(middle).values()) <= self._load.utilization:
                fits = middle
            else:
                over = middle
        return fits

    def size(self) -> Sizing:
        """Raises ConfigError where not even one stream fits a machine."""
        load, limits = self._load, self.limits()
        binds, most = min(limits.items(), key=lambda limit: limit[1])
        if not most:
            raise ConfigError(self._impossible(binds))
        machines = -(-load.streams // most)
        each = -(-load.streams // machines)
        busy = self.busy(each)
        step, prompt = sum(self.step(each).values()), sum(self.prompt().values())
        if binds == "time":
            binds = largest(self.busy(most))
        link, costs = self._machine.host_link, self.costs
        return Sizing(
            basis=self._machine.basis,
            binds=binds,
            machines=machines,
            streams_per_machine=each,
            most_streams_per_machine=most,
            limits=limits,
            shares_of_time=busy,
            tokens_per_s=load.streams * load.rate,
            prompt_tokens_per_s=load.streams * load.rate * load.prompt_tokens / load.answer_tokens,
            step_seconds=step,
            gap_seconds=step + each * load.prompt_tokens / load.answer_tokens * prompt,
            first_token_seconds=step + load.prompt_tokens * prompt / (1 - sum(busy.values())),
            state_bytes=costs.state_bytes,
            weight_bytes=costs.weight_bytes,
            suspend_seconds=None if link is None else costs.state_bytes / link,
            fleet=size_fleet(load, self._faults, Need(machines, sum(busy.values()), step, prompt, costs.state_bytes)),
            costs=asdict(costs),
            load=asdict(load),
            machine=asdict(self._machine),
        )

    def _impossible(self, binds: str) -> str:
        name, costs = self._machine.name, self.costs
        if binds == "state memory":
            needed = size_text(costs.weight_bytes + costs.state_bytes)
            return f"--gpu {name}: weights and the state of one stream are {needed}, more than {MEMORY_SHARE:.0%} of it"
        alone = self._load.rate / sum(self.busy(1).values())
        fastest = self._load.utilization * min(alone, FRAMES)
        return f"--rate {self._load.rate:g}: a stream alone on {name} gets at most {fastest:,.0f} tokens/s"


def longer(*parts: tuple[str, float]) -> Seconds:
    """Two things that are done at the same time take as long as the longer one."""
    name, seconds = max(parts, key=lambda part: part[1])
    return {name: seconds}


def added(*parts: Seconds) -> Seconds:
    """One after the other."""
    names = {name: None for part in parts for name in part}
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def scaled(factor: float, seconds: Seconds) -> Seconds:
    return {name: factor * each for name, each in seconds.items()}


def largest(seconds: Seconds) -> str:
    return max(seconds, key=lambda name: seconds[name])


def plan(path: Path, gpu: str, results: Path | None, flags: Mapping[str, str]) -> Sizing:
    """For a model's folder or file; `flags` are the texts of those that were given.

    Raises:
        ConfigError: a flag that cannot be, or a load that no such machine can serve.
        CheckpointError: the model cannot be loaded.
    """
    machine = machine_of(gpu, results)
    wanted = {name: text for name, text in flags.items() if name not in Faults.names()}
    faults = Faults.read({name: text for name, text in flags.items() if name in Faults.names()})
    Load.read(wanted)  # before the model is opened
    config = open_checkpoint(path).config
    load = Load.read({"window": str(config.suggested_window), **wanted})
    return Planner(config, machine, load, faults).size()
