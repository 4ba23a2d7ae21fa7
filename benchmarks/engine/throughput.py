"""Tokens per second of the engine in process: scheduler, runner and kernels, without HTTP.

    python -m benchmarks.engine.throughput          # the bundled model
    python -m benchmarks.engine.throughput --exact  # contexts are really prefilled; by default only positions are
    python -m benchmarks.engine.throughput --only contexts --repeats 101 --contexts 256 65536

Three measurements, each with variants that take turns; figures are medians, and `figure` holds the rounds of one and
their interval. Prints no speed while the engine's logits are off the specification. Writes `engine-cpu.json` (by the
device's name) and, from it, `engine-batches.svg` and `engine-contexts.svg`. Its keys:

    batches    decoding of so many sequences by the scheduler's loop: tokens/s, ms per step
    contexts   decoding at a position by the runner alone: microseconds per token of a batch of `batch`, and the ratio
               to the first context with the interval that holds 95 % of resampled ratios. `exact` says whether the
               context was prefilled. Without it the state comes from a short prompt and only the position is that far
               out, as no operation depends on how many tokens a state has summed. With a window, the pass over the
               state that begins a block, once in half a window of tokens, is left out
    mixes      `decoders` sequences decode while `prompts` others are in their prompts, by the scheduler's loop
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bdh_batch.checkpoint.checkpoint import Model, load_model
from bdh_batch.checkpoint.config import bytes_per_sequence
from bdh_batch.engine.completion import Completion
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.engine.torch_threads import keep_to_one_thread
from bdh_batch.kernels.base import Kernels
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.select import select_kernels
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Plan, SamplingParams, Segment
from bdh_batch.scheduler.scheduler import Scheduler
from bdh_batch.scheduler.sequence import Client, Sequence as Generation
from bdh_batch.system.device_memory import free_memory
from benchmarks import ROOT
from benchmarks.common import Times, figure, medians, ratio, take_turns, wall_clock
from benchmarks.engine.dense import relative_error
from benchmarks.engine.play import Silent
from benchmarks.plots import lines
from benchmarks.report import report_head, results_folder, write_report

MODEL = ROOT / "models" / "bdh-shakespeare"
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PROMPT = 64  # tokens, of which a decoding sequence's state comes unless its context is exact
ENDLESS = 1 << 40  # tokens asked for by sequences that decode as long as the benchmark runs
MEASUREMENTS = ("batches", "contexts", "mixes")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    model = load_model(arguments.model, dtype, device)
    kernels, reason = select_kernels(arguments.kernels, model.weights, arguments.window)
    if isinstance(kernels, CpuKernels):
        keep_to_one_thread()  # as the worker's thread does
    bench = Bench(model, kernels, arguments)
    tolerance = max(TOLERANCES[dtype], TOLERANCES[bench.state_dtype])
    if not (error := bench.disagreement()) <= tolerance:
        sys.exit(f"The engine is {error:.1e} off the specification: no speed is worth printing.")
    report = {
        **report_head(["torch", "numba"]),
        "model": model.config.to_dict(),
        "kernels": reason,
        "device": str(device),
        "dtype": arguments.dtype,
        "attention_window": arguments.window,
        "state_dtype": arguments.state_dtype,
        "largest_relative_error": error,
        "repeats": arguments.repeats,
        **{name: getattr(bench, name)() for name in arguments.only},
    }
    write_report(arguments.out / f"engine-{device.type}.json", report)
    draw(arguments.out, report)
    print_report(report)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.engine.throughput",
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a model folder or file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--kernels", choices=["auto", "torch", "cpu", "triton"], default="auto")
    parser.add_argument("--state-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--window", type=int, default=0, help="tokens that a token looks back on; 0 for all")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--contexts", nargs="+", type=int, default=[256, 1024, 4096, 16384, 65536])
    parser.add_argument("--context-batch", type=int, default=8, help="sequences that decode at each context")
    parser.add_argument("--exact", action="store_true", help="prefill every context, one sequence, copied to the batch")
    parser.add_argument("--decoders", type=int, default=32, help="of the mixes")
    parser.add_argument("--prompts", nargs="+", type=int, default=[0, 1, 4], help="of the mixes")
    parser.add_argument("--prefill-tokens", type=int, default=256, help="most prompt tokens in a step")
    parser.add_argument("--steps", type=int, default=8, help="in each timed run")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(argv)


class Loop:
    """The worker's loop without its thread: plan, run, commit."""

    def __init__(self, runner: Runner, slots: int, prefill_tokens: int) -> None:
        self._runner = runner
        self._scheduler = Scheduler(slots, prefill_tokens)
        self._prefill_tokens = prefill_tokens
        self._prompts: list[Generation] = []
        self.decoded = self.prefilled = 0

    def decode(self, prompts: Sequence[list[int]]) -> None:
        """Starts sequences, and takes them through their prompts."""
        self._scheduler.submit([generation(prompt, seed) for seed, prompt in enumerate(prompts)])
        while len(self._scheduler.stages.backlog) or self.decoded < len(prompts):
            self.decoded = 0
            self.step()

    def prefill(self, prompts: Sequence[list[int]]) -> None:
        """Starts prompts anew, instead of those before them."""
        self._scheduler.abort(self._prompts)
        self._prompts = [generation(prompt, seed) for seed, prompt in enumerate(prompts)]
        self._scheduler.submit(self._prompts)

    def run(self, steps: int) -> None:
        self.decoded = self.prefilled = 0
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        planned = self._scheduler.plan(0.0)
        assert planned is not None
        decoding = sum(bool(sequence.generated) for sequence in planned.sequences)
        self.decoded += decoding
        self.prefilled += planned.plan.tokens - decoding
        self._scheduler.commit(planned, self._runner.run(planned.plan), 0.0)


def generation(prompt: list[int], seed: int) -> Generation:
    sampling = SamplingParams(temperature=0.8, seed=seed)
    silent = Silent()
    return Generation("", Completion(prompt, ENDLESS, sampling, silent), Client(silent))


@dataclass(frozen=True)
class Variant:
    """Something to time, and what has to be done before it each time, untimed."""

    prepare: Callable[[], object]
    run: Callable[[], object]

    def __call__(self) -> None:
        self.prepare()
        self.run()


class Bench:
    def __init__(self, model: Model, kernels: Kernels, arguments: argparse.Namespace) -> None:
        self._model, self._kernels, self._arguments = model, kernels, arguments
        self._generator = torch.Generator().manual_seed(0)
        self.state_dtype: torch.dtype = getattr(torch, arguments.state_dtype)

    def disagreement(self) -> float:
        """The largest relative error over ragged prompts, decode steps, and one far out, and the states after them."""
        window, far = self._arguments.window, max(self._arguments.contexts)
        rows = [self._text(48) for _ in range(3)]
        steps = [
            [Segment(s, 0, row[: 20 + 9 * s], None) for s, row in enumerate(rows)],
            [Segment(s, 20 + 9 * s, row[20 + 9 * s : 21 + 9 * s], None) for s, row in enumerate(rows)],
            [Segment(2, far, rows[0][:1], None), Segment(0, far, rows[1][:7], None)],
        ]
        variants: list[list[Tensor]] = []
        for kernels in (TorchKernels(self._model.weights, window), self._kernels):
            pool = self._pool(3)
            runner = Runner(kernels, pool)
            with torch.inference_mode():
                variants.append([*(runner.logits(step).clone() for step in steps), pool.states])
        return relative_error(variants[1], variants[0])

    def batches(self) -> list[dict[str, Any]]:
        sizes, steps = self._arguments.batches, self._arguments.steps
        self._refuse_too_many(sum(sizes))
        variants = {}
        for size in sizes:
            loop = self._loop(size)
            loop.decode([self._text(PROMPT) for _ in range(size)])
            variants[str(size)] = Variant(lambda: None, partial(loop.run, steps))
        rounds = self._measure("batches", variants)
        times = medians(rounds)
        return [
            {
                "batch": size,
                "tokens_per_s": size * steps / times[str(size)],
                "ms_per_step": 1e3 * times[str(size)] / steps,
                "figure": figure([size * steps / seconds for seconds in rounds[str(size)]], "tokens/s", "higher"),
            }
            for size in sizes
        ]

    def contexts(self) -> dict[str, Any]:
        """Every run begins with the same states and tokens; variants differ in position, and if exact in the state."""
        contexts, size, exact = self._arguments.contexts, self._arguments.context_batch, self._arguments.exact
        steps, after = self._arguments.steps, int(self._arguments.window > 0)  # a block's first token
        self._refuse_too_many(size + len(contexts))
        pool = self._pool(size)
        runner = Runner(self._kernels, pool)
        short = None if exact else self._state_after(PROMPT)
        tokens = self._text(steps)
        variants = {}
        for context in contexts:
            begun = self._state_after(context + after) if short is None else short
            plans = [
                Plan([Segment(s, context + after + i, [token], SamplingParams(0.8, seed=s)) for s in range(size)])
                for i, token in enumerate(tokens)
            ]
            variants[str(context)] = Variant(partial(pool.states.copy_, begun), partial(run_all, runner, plans))
        times = self._measure("contexts", variants)
        first = times[str(contexts[0])]
        return {
            "batch": size,
            "exact": exact,
            "by_context": [
                {
                    "context": context,
                    "us_per_token": 1e6 * seconds / (steps * size),
                    "figure": figure([1e6 * each / (steps * size) for each in times[str(context)]], "µs", "lower"),
                    f"ratio_to_{contexts[0]}": asdict(ratio(times[str(context)], first)),
                }
                for context, seconds in zip(contexts, medians(times).values())
            ],
        }

    def mixes(self) -> list[dict[str, Any]]:
        decoders, steps, budget = self._arguments.decoders, self._arguments.steps, self._arguments.prefill_tokens
        counts = self._arguments.prompts
        self._refuse_too_many(len(counts) * decoders + sum(counts))
        loops, variants = {}, {}
        for count in counts:
            loop = loops[count] = self._loop(decoders + count)
            loop.decode([self._text(PROMPT) for _ in range(decoders)])
            prompts = [self._text(steps * budget + 2) for _ in range(count)]  # none of which ends in a run
            variants[str(count)] = Variant(partial(loop.prefill, prompts), partial(loop.run, steps))
        rounds = self._measure("mixes", variants)
        times = medians(rounds)
        return [
            {
                "decoders": decoders,
                "prompts": count,
                "decoded_tokens_per_s": loops[count].decoded / times[str(count)],
                "prefilled_tokens_per_s": loops[count].prefilled / times[str(count)],
                "ms_per_step": 1e3 * times[str(count)] / steps,
                "figure": figure([1e3 * seconds / steps for seconds in rounds[str(count)]], "ms a step", "lower"),
            }
            for count in counts
        ]

    def _measure(self, name: str, variants: dict[str, Variant]) -> Times:
        def clock(variant: Callable[[], object]) -> float:
            assert isinstance(variant, Variant)
            variant.prepare()
            return wall_clock(variant.run)

        with tqdm(total=self._arguments.repeats, desc=name, file=sys.stderr) as bar:
            return take_turns(variants, self._arguments.repeats, clock, bar.update)

    def _text(self, length: int) -> list[int]:
        drawn: list[int] = torch.randint(
            0, self._model.config.vocab_size, (length,), generator=self._generator
        ).tolist()
        return drawn

    def _pool(self, slots: int) -> StatePool:
        device, window = self._model.weights.embed.device, self._arguments.window
        pool = StatePool(self._model.config, slots, device, window, self.state_dtype)
        pool.states.zero_()  # written here, so that no timed run is the first to touch its memory
        return pool

    def _loop(self, slots: int) -> Loop:
        return Loop(Runner(self._kernels, self._pool(slots)), slots, self._arguments.prefill_tokens)

    def _state_after(self, context: int) -> Tensor:
        """One sequence's state, prefilled in chunks."""
        pool, text, chunk = self._pool(1), self._text(context), self._arguments.prefill_tokens
        runner = Runner(self._kernels, pool)
        for start in range(0, context, chunk):
            runner.forward([Segment(0, start, text[start : start + chunk], None)])
        return pool.states

    def _refuse_too_many(self, states: int) -> None:
        needed = states * bytes_per_sequence(self._model.config, self._arguments.window, self.state_dtype)
        free = free_memory(self._model.weights.embed.device)
        if needed > free:
            sys.exit(f"{states} states need {needed:,} bytes, {free:,} are free: measure smaller batches.")


def run_all(runner: Runner, plans: Sequence[Plan]) -> None:
    for plan in plans:
        runner.run(plan)


def draw(folder: Path, report: dict[str, Any]) -> None:
    if batches := report.get("batches"):
        found = ([row["batch"] for row in batches], [row["tokens_per_s"] for row in batches])
        lines(folder / "engine-batches.svg", "Decoding", "sequences in the batch", "tokens/s", {"in process": found})
    if contexts := report.get("contexts"):
        rows = contexts["by_context"]
        cost = ([row["context"] for row in rows], [row["us_per_token"] for row in rows])
        label = f"batch of {contexts['batch']}"
        lines(folder / "engine-contexts.svg", "Cost of a token", "context", "µs per token", {label: cost})


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['kernels']}; largest relative error {report['largest_relative_error']:.1e}")
    for row in report.get("batches", []):
        print(f"batch {row['batch']:>3}: {row['tokens_per_s']:9,.0f} tokens/s, {row['ms_per_step']:.2f} ms a step")
    for row in report.get("contexts", {}).get("by_context", []):
        context, cost, (against, compared) = row["context"], row["us_per_token"], list(row.items())[-1]
        interval = f"{compared['value']:.3f} ({compared['low']:.3f} to {compared['high']:.3f})"
        print(f"context {context:>6}: {cost:7.1f} µs a token, {against.replace('_', ' ')} {interval}")
    for row in report.get("mixes", []):
        rates = f"{row['decoded_tokens_per_s']:,.0f} decoded and {row['prefilled_tokens_per_s']:,.0f} prompt tokens/s"
        print(
            f"{row['decoders']} decode, {row['prompts']} in their prompts: {rates}, {row['ms_per_step']:.2f} ms a step"
        )


if __name__ == "__main__":
    main()
