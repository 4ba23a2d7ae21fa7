"""Drafts from a sequence's own text: what they cost, how often they come true, and what they bring.

    python -m benchmarks.engine.drafts

`steps`: milliseconds of a step whose segments have drafts of 0 to 15 tokens, all accepted or none, by the size of the
batch; the kernels alone, variants by turns. `wide` is the same for a model of upstream's default sizes, 25 million
random weights of which 15 % fire, whose states no cache holds. `texts`: tokens/s with drafts and without, by turns, in
process; texts must be the same. `repeats` is a text that repeats all the time, as a bias leaves one token: the most
that drafts can bring. `greedy` is the likeliest text, `free` is one at temperature 0.8. `true` says of the first,
second, … token of a draft how often it came true where it was tried. Writes `drafts.json`.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence as Many
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bdh_batch import settings
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.loading import LoadedEngine, load_engine, scheduler_for
from bdh_batch.engine.mailbox import Mailbox
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.base import DraftKernels
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.messages import NO_TOKENS, LogitBias, LogitsProcessors, Plan, SamplingParams, Segment
from bdh_batch.processes.model_settings import bundled_model
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Prefix, Sequence
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import ByteTokenizer
from benchmarks import ROOT
from benchmarks.common import alternate, figure, ratio
from benchmarks.engine.synthetic import synthetic_weights
from benchmarks.report import report_head, results_folder, write_report

CONTEXT = 300  # tokens before the steps that are measured
LENGTHS = (0, 1, 2, 3, 5, 7, 11, 15)
BATCHES = (1, 8, 32)
KINDS = {
    "repeats": SamplingParams(temperature=0.0, logit_bias=LogitBias.of({ord("a"): 100.0})),
    "greedy": SamplingParams(temperature=0.0),
    "free": SamplingParams(temperature=0.8),
}
VALIDATION = ROOT / "tests" / "data" / "shakespeare-validation.txt"


def load(*options: tuple[str, Any]) -> tuple[settings.Settings, LoadedEngine]:
    chosen = settings.load(None, [("model.path", str(bundled_model())), *options]).settings
    return chosen, load_engine(chosen, bundled_model())


def wide(batch: int) -> Runner:
    """A model whose states no cache holds."""
    config = BDHConfig()
    return Runner(CpuKernels(synthetic_weights(config, 0.15)), StatePool(config, batch, torch.device("cpu")))


def steps(runner: Any, batch: int, repeats: int) -> dict[str, float]:
    """Milliseconds of the forward pass by the length of the drafts, accepted and not."""
    assert isinstance(runner, Runner)
    text = VALIDATION.read_bytes()
    for slot in range(batch):
        runner.forward([Segment(slot, 0, text[1000 * slot : 1000 * slot + CONTEXT], None)])
    kernels, states = runner._kernels, runner._pool.states
    assert isinstance(kernels, DraftKernels)

    def step(drafts: int, accepts: bool) -> None:
        segments = [
            Segment(slot, CONTEXT, text[1000 * slot + CONTEXT : 1000 * slot + CONTEXT + 1 + drafts], None)
            for slot in range(batch)
        ]
        runner.forward(segments, drafts=[drafts] * batch if drafts else [])
        if drafts:
            kernels.accept(states, [drafts if accepts else 0] * batch)

    variants = {
        f"{drafts} {'accepted' if accepts else 'tried'}": partial(step, drafts, accepts)
        for drafts in LENGTHS
        for accepts in (False, True)
        if batch * (1 + drafts) <= kernels.most_tried
    }
    return {name: round(1e3 * seconds, 4) for name, seconds in alternate(variants, repeats, bare_clock).items()}


def bare_clock(variant: Any) -> float:
    began = time.perf_counter()
    variant()
    return time.perf_counter() - began


def play(scheduler: Scheduler, engine: LoadedEngine, kind: str, batch: int, tokens: int) -> Any:
    """Generates `tokens` in each of a batch's sequences; returns tokens/s after their first ones, and all tokens."""
    sequences, text = [], VALIDATION.read_bytes()
    for number in range(batch):
        params, prompt = replace(KINDS[kind], seed=number), text[1000 * number : 1000 * number + CONTEXT]
        processors = LogitsProcessors.of(params, prompt, NO_TOKENS, 0)
        decoder = TextStream(ByteTokenizer().decoder())
        completion = Completion([*prompt], tokens, params, decoder, processors=processors)
        sequences.append(Sequence(str(number), completion, Client(Mailbox()), prefix=Prefix("x")))
    scheduler.submit(sequences)
    began = done = 0.0
    while scheduler.has_work:
        now = time.perf_counter()
        if not began and all(sequence.generated for sequence in sequences):
            began, done = now, sum(len(sequence.generated) for sequence in sequences)
        step = scheduler.plan(now)
        assert step is not None
        outcome = engine.runner.run(step.plan)
        scheduler.commit(step, outcome, time.perf_counter())
    total = sum(len(sequence.generated) for sequence in sequences)
    return (total - done) / (time.perf_counter() - began), [sequence.generated for sequence in sequences]


class Observed:
    """A runner that counts which tokens of drafts come true."""

    def __init__(self, engine: LoadedEngine) -> None:
        self._run = engine.runner.run
        self.tried: Counter[int] = Counter()
        self.true: Counter[int] = Counter()

    def run(self, plan: Plan) -> Any:
        outcome = self._run(plan)
        for row, segment in enumerate(plan.segments):
            accepted = len(outcome.more.get(row, ()))
            self.tried.update(range(min(len(segment.draft), accepted + 1)))
            self.true.update(range(accepted))
        return outcome


def texts(plain: Any, drafted: Any, kind: str, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens/s with and without drafts, each round of both."""
    speeds: dict[str, list[float]] = {"without": [], "with": []}
    same = True
    for number in range(rounds + 1):
        found = []
        for name, (chosen, engine) in {"without": plain, "with": drafted}.items():
            speed, generated = play(scheduler_for(chosen, engine), engine, kind, batch, tokens)
            found.append(generated)
            if number:  # the first is to warm up
                speeds[name].append(speed)
        same = same and found[0] == found[1]
    observed, scheduler = Observed(drafted[1]), scheduler_for(*drafted)
    play(scheduler, replace(drafted[1], runner=observed), kind, batch, tokens)
    gain = ratio(speeds["with"], speeds["without"])
    return {
        **{name: figure(each, "tokens/s", "higher") for name, each in speeds.items()},
        "ratio": {"value": gain.value, "low": gain.low, "high": gain.high},
        "same": same,
        "draft_tokens": scheduler.drafts.counts.tokens,
        "accepted": scheduler.drafts.counts.accepted,
        "true": [round(observed.true[at] / tried, 3) for at, tried in sorted(observed.tried.items())],
    }


def main(arguments: Many[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--out", type=Path, default=results_folder())
    parser.add_argument("--length", type=int, default=8, help="most tokens of a draft")
    chosen = parser.parse_args(arguments)
    head = report_head(["torch", "numba"])
    torch.set_grad_enabled(False)
    length = ("speculative.num_speculative_tokens", chosen.length)
    drafted = load(("speculative.method", "ngram"), length, ("prefix_cache.enabled", False))
    plain = load(("prefix_cache.enabled", False))
    report: dict[str, Any] = {"steps": {}, "wide": {}, "texts": {}}
    for batch in chosen.batches:
        report["steps"][str(batch)] = steps(drafted[1].runner, batch, chosen.repeats)
        print(batch, report["steps"][str(batch)], flush=True)
    report["wide"]["1"] = steps(wide(1), 1, chosen.repeats // 4)
    print("wide", report["wide"], flush=True)
    for batch in chosen.batches:
        for kind in KINDS:
            tokens = max(50, chosen.tokens // max(1, batch // 4))
            report["texts"][f"{batch} {kind}"] = found = texts(plain, drafted, kind, batch, tokens, chosen.rounds)
            print(batch, kind, found["ratio"], found["same"], found["true"], found["accepted"], flush=True)
    write_report(chosen.out / "drafts.json", head | {"rounds": chosen.rounds} | report)


if __name__ == "__main__":
    main()
