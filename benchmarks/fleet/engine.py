"""One engine on a virtual clock: the server's scheduler, and steps that take as long as a model of their cost says."""

from __future__ import annotations

from collections.abc import Collection, Sequence as Many
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol, cast

from bdh_batch.checkpoint.checkpoint import Model
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.loading import LoadedEngine, copy_limits, scheduler_for
from bdh_batch.engine.worker import StepRunner
from bdh_batch.messages import Copy, GenerationRequest, Outcome, SamplingParams
from bdh_batch.plan.sizing import Planner
from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Prefix, Sequence, Times
from bdh_batch.settings import Settings
from benchmarks.engine.play import Silent

TOKEN = 1  # what every draw gives
PARAMS = SamplingParams()


class Costs(Protocol):
    """Seconds of a step; `copies` are whole states, or parts of them, that it copies."""

    def of(self, decodes: int, prefill_tokens: int, copies: float) -> float: ...


class Planned:
    """The costs that `bdh-batch plan` reckons with."""

    def __init__(self, planner: Planner, copied_per_s: float) -> None:
        self._planner = planner
        self._steps: dict[int, float] = {}  # by the streams in them
        self._prompt = sum(planner.prompt().values())
        self._copy = planner.costs.state_bytes / copied_per_s

    def of(self, decodes: int, prefill_tokens: int, copies: float) -> float:
        if (step := self._steps.get(decodes)) is None:
            step = self._steps[decodes] = sum(self._planner.step(decodes).values())
        return step + self._prompt * prefill_tokens + self._copy * copies


def scheduler_of(settings: Settings, config: BDHConfig, slots: int, state_bytes: int) -> Scheduler:
    """The scheduler of a server with these settings and so many slots, without a GPU."""
    copies = copy_limits(state_bytes, None)
    model, runner = cast(Model, SimpleNamespace(config=config)), cast(StepRunner, None)  # nothing is computed
    return scheduler_for(settings, LoadedEngine(model, runner, slots, 0, grows=True, copies=copies))


def copied(copies: Many[Copy]) -> float:
    """How many whole states these are."""
    return sum((copy.end - copy.begin) / copy.parts for copy in copies if not copy.moves)


@dataclass(frozen=True, slots=True)
class Gained:
    """What a step brought one request."""

    key: int
    tokens: int
    computed: int  # tokens that were computed for it by this engine, at its end
    cached: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Lost:
    """What was lost of one request: tokens in its state, and whether it may be what crashed the engine."""

    key: int
    computed: int
    cached: int
    suspect: bool


class Engine:
    """Computes requests step by step. Who calls it keeps the clock.

    While all its requests decode and nothing else is to be done, one step is as the next: then it begins as many at
    once as there are until a request ends. What comes meanwhile ends that after the step that is under way.

    Args:
        costs: of its steps.
        leaps: whether it begins more than one step at a time.
    """

    def __init__(self, scheduler: Scheduler, costs: Costs, leaps: bool = True) -> None:
        self.scheduler = scheduler
        self.computed = 0  # tokens, of prompts and of completions
        self.now = 0.0  # of its last step
        self.done: float | None = None  # when the steps that were begun are done; None where there are none
        self._costs = costs
        self._leaps = leaps
        self._step: Step | None = None
        self._begun = self._each = 0.0  # when the first of these steps began, and the seconds of each
        self._count = 0  # of these steps
        self._keys: dict[Sequence, int] = {}

    @property
    def load(self) -> int:
        """Sequences that run or wait."""
        return len(self._keys)

    @property
    def prompt_tokens(self) -> int:
        """That are still to be computed, of prompts that run or wait."""
        return self.scheduler.stages.backlog.tokens + self.scheduler.stages.prompt_tokens

    def submit(self, key: int, request: GenerationRequest, generated: Many[int], now: float) -> None:
        """Takes in a request under a number; `generated` are the tokens that other engines have returned of it."""
        silent, (prompt,) = Silent(), request.prompts
        sequence = Sequence(
            id=request.origin.id,
            completion=Completion(prompt.tokens, request.max_tokens, PARAMS, silent),
            client=Client(silent),
            prefix=Prefix(request.origin.cache_namespace, request.salt, prompt.breaks),
            times=Times(arrived=now),
            tenant=request.origin.tenant,
            weight=request.origin.weight,
        )
        sequence.resume(generated)
        self._keys[sequence] = key
        self.scheduler.submit([sequence])
        if self._step is not None and self._count > 1:
            self._count = min(self._count, self._made(now) + 1)
            self.done = self._begun + self._count * self._each

    def begin(self, now: float) -> None:
        """Begins steps if there is something to do: `done` says when they will be."""
        step = self._step = self.scheduler.plan(now)
        if step is None:
            self.done = None
            return
        self._each = self._costs.of(step.decodes, step.prefill_tokens, copied(step.plan.copies))
        self._begun, self._count = now, self._alike(step) if self._leaps else 1
        self.done = now + self._count * self._each

    def finish(self) -> list[Gained]:
        """Ends the steps that were begun."""
        step, now = self._step, self.done
        assert step is not None
        assert now is not None
        self._step, self.done, self.now = None, None, now
        if self._count > 1:
            self._advance(step, self._count - 1)
            self.scheduler.counts.steps += self._count - 1
            step = step._replace(planned=now - self._each)
        self.computed += step.plan.tokens
        drawn = Outcome([TOKEN if segment.sampling else None for segment in step.plan.segments])
        gained = []
        for sequence, delta in self.scheduler.commit(step, drawn, now):
            ended = delta.finish_reason is not None
            key = self._keys.pop(sequence) if ended else self._keys[sequence]
            gained.append(Gained(key, len(delta.tokens) + self._count - 1, *self._work(sequence), ended))
        return gained

    def lose(self, now: float) -> tuple[list[Gained], float, list[Lost]]:
        """The process is gone: returns what it brought its requests before that, when the last of it came, and what is
        lost. It computes no more."""
        made = self._made(now) if self._count > 1 else 0
        gained: list[Gained] = []
        if self._step is not None and made:
            self._advance(self._step, made)
            gained = [Gained(self._keys[s], made, *self._work(s), ended=False) for s in self._step.sequences]
        suspects = self._suspects()
        return (
            gained,
            self._begun + made * self._each,
            [Lost(key, *self._work(sequence), sequence in suspects) for sequence, key in self._keys.items()],
        )

    def _alike(self, step: Step) -> int:
        """How many steps from this one on are the same, if nothing comes."""
        apart = step.prefill_tokens or step.plan.copies or step.plan.releases or step.decodes < len(self._keys)
        return 1 if apart else min(s.completion.max_tokens - len(s.generated) for s in step.sequences)

    def _made(self, now: float) -> int:
        """How many of the steps that were begun are over."""
        return min(self._count - 1, int((now - self._begun) / self._each)) if self._step is not None else 0

    def _advance(self, step: Step, steps: int) -> None:
        """Does for each sequence what so many steps like this one would do."""
        self.computed += steps * step.decodes
        for sequence in step.sequences:
            sequence.generated = [TOKEN] * (len(sequence.generated) + steps)
            sequence.completion.resume(sequence.generated)
            sequence.computed += steps
            sequence.standing.account.charge(0, steps)

    def _suspects(self) -> Collection[Sequence]:
        """Those in the step without a token of this engine, as the record of a real one says."""
        step = () if self._step is None else self._step.sequences
        return {sequence for sequence in step if sequence.times.last_token is None}

    @staticmethod
    def _work(sequence: Sequence) -> tuple[int, int]:
        return sequence.computed - sequence.prefix.cached, sequence.prefix.cached
