"""What it costs to ask for the neurons of each token: steps of the engine, with askers and without.

    python -m benchmarks.engine.neurons              # 1 stream and 16, 9 rounds
    python -m benchmarks.engine.neurons --rounds 3 --tokens 50

Scheduler and runner in process, with the bundled model or another one. Variants take turns: nobody asks, all do, and
one of the streams does. Writes `neurons.json`: milliseconds of a token of all streams, and ratios to the round in which
nobody asks; `encode` is what a response's JSON takes for one token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.neurons import most_watched
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.http.responses.tokens import neurons
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.messages import Delta, Neurons, NeuronsAsked, SamplingParams
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Sequence
from bdh_batch.scheduler.watched import WatchedSequence
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import ByteTokenizer
from benchmarks.common import figure, ratio, take_turns
from benchmarks.report import report_head, results_folder, write_report

MODEL = Path(__file__).parents[2] / "models" / "bdh-shakespeare"
PROMPT = b"First Citizen:\nBefore we proceed any further, hear me speak."
STREAMS = (1, 16)
ENCODED = 64  # tokens at a time


class Nobody:
    """Receives deltas, and keeps the neurons of the last token."""

    last: list[Neurons]

    def put(self, index: int, delta: Delta) -> None:
        if delta.neurons:
            self.last = delta.neurons


def main() -> None:
    arguments = parse()
    model = load_model(arguments.model, torch.float32, torch.device("cpu"))
    kernels, config = CpuKernels(model.weights), model.config
    report = {**report_head(["torch", "numba"]), "rounds": arguments.rounds, "top": arguments.top, "streams": {}}
    for streams in STREAMS:
        runner = Runner(kernels, StatePool(config, streams, torch.device("cpu")))
        most = most_watched(config.n_layer, config.n_head, config.neurons_per_head)
        outbox, asked = Nobody(), NeuronsAsked(arguments.top)
        run = partial(generate, runner, streams, most, arguments.tokens, asked, outbox)
        variants: dict[str, Callable[[], object]] = {
            "nobody asks": partial(run, 0),
            "all ask": partial(run, streams),
        }
        if streams > 1:
            variants["one asks"] = partial(run, 1)
        with tqdm(total=arguments.rounds, desc=f"{streams} streams", unit="round") as bar:
            times = take_turns(variants, arguments.rounds, tick=bar.update)
        each = {name: [1000 * one / arguments.tokens for one in seconds] for name, seconds in times.items()}
        figures: dict[str, object] = {name: figure(some, "ms", "lower") for name, some in each.items()}
        for name in [*variants][1:]:
            found = ratio(each[name], each["nobody asks"])
            figures[f"{name} / nobody asks"] = {"value": found.value, "low": found.low, "high": found.high}
        encoded = take_turns({"encode": partial(neurons, outbox.last * ENCODED)}, arguments.rounds)["encode"]
        figures["encode"] = figure([1e3 * one / ENCODED for one in encoded], "ms", "lower")
        report["streams"][str(streams)] = figures
    write_report(arguments.out / "neurons.json", report)
    print(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=100, help="of each stream in a round")
    parser.add_argument("--top", type=int, default=16)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args()


def generate(
    runner: Runner, streams: int, most: int, tokens: int, asked: NeuronsAsked, outbox: Nobody, askers: int
) -> None:
    """Generates `tokens` for each of `streams`, of which the first `askers` ask for neurons."""
    scheduler, now = Scheduler(streams, 256, Policy(most_watched=most)), 0.0
    sequences = []
    for index in range(streams):
        sampling = SamplingParams(temperature=0.8, seed=index)
        completion = Completion(PROMPT, tokens, sampling, TextStream(ByteTokenizer().decoder()))
        kind = partial(WatchedSequence, asked=asked) if index < askers else Sequence
        sequences.append(kind(id=str(index), completion=completion, client=Client(outbox)))
    scheduler.submit(sequences)
    while (step := scheduler.plan(now)) is not None:
        for sequence, delta in scheduler.commit(step, runner.run(step.plan), now):
            sequence.client.outbox.put(0, delta)


if __name__ == "__main__":
    main()
