"""How fast the CPU kernels are, against this machine's ceilings, the dense recurrence in torch, and recomputing.

    python -m benchmarks.engine.kernels  # synthetic weights of a trained model's density
    python -m benchmarks.engine.kernels --model models/bdh-shakespeare --text shakespeare.txt

The variants of every comparison alternate in one run, but for recomputing, which takes so long that it follows, three
times; figures are medians. Prints no speed while a result is wrong.
Writes `kernels-cpu.json` and, from it, `kernels-passes.svg` and `kernels-decode.svg`. Its keys:

    machine_rates   bytes that a copy, and a pass in place, read and write in a second, and operations of a large
                    product, on all threads
    decode          tokens/s of a step of `batch` sequences, with states of float32 and of bfloat16, of the baselines
                    (float32), and how many times as fast each step is:
      dense_per_sequence   the specification: whole states, one sequence after the other
      dense_batched        whole states, `y = q @ S` and `S += q.mT @ x` for the whole batch in one tensor
      recompute_at_C       a context of C tokens from its start, as upstream's `generate` does for every token
    figures         the same tokens/s, and those of the prompt, with their rounds and intervals
    passes          each pass of such a step by itself, on the last layer's lists of a step before: its time, and its
                    speed in percent of what the machine's rates give. A pass in place can be faster than a copy
    prefill         one prompt in chunks, with states of either dtype
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.base import Kernels, RaggedBatch, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.torch_reference import (
    TorchKernels,
    attend_segment,
    layer_norm,
    project,
    rotate,
    rotation,
)
from benchmarks.common import alternate, figure, medians, take_turns
from benchmarks.engine.dense import dense_batched, recompute, relative_error
from benchmarks.engine.passes import Machine, machine_variants, pass_variants
from benchmarks.engine.synthetic import synthetic_weights
from benchmarks.plots import bars
from benchmarks.report import report_head, results_folder, write_report

CPU = torch.device("cpu")
BUNDLED = BDHConfig(n_layer=6, n_embd=128, n_head=4, mlp_internal_dim_multiplier=32, vocab_size=256)
CHUNK = 512
CHECKED = 4  # sequences that are compared with the specification
STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}  # bfloat16 keeps 8 bits


@dataclass(frozen=True)
class Densities:
    """Shares of all neurons, or of all pairs, averaged over tokens and layers."""

    fired: float
    pairs: float
    gated: float


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    head = report_head(["torch", "numba"])
    torch.manual_seed(0)
    if arguments.model:
        model = load_model(arguments.model, torch.float32, CPU)
        config, weights = model.config, model.weights
    else:
        config, weights = BUNDLED, synthetic_weights(BUNDLED, arguments.density)
    tokens = read_tokens(arguments.text, config.vocab_size, max(CHECKED, arguments.batch) * 1024 + arguments.prompt)
    errors = {name: disagreement(config, weights, tokens, dtype) for name, dtype in STATES.items()}
    for name, error in errors.items():
        if not error <= TOLERANCES[name]:
            sys.exit(f"With {name} states the CPU kernels are {error:.1e} off the specification: no speed is printed.")
    with torch.inference_mode():
        densities = measure_densities(weights, tokens[:512])
        bench = Bench(config, weights, tokens, arguments.batch, densities, arguments.repeats)
        results = bench.run(arguments.context, arguments.prompt)
    report = {
        **head,
        "model": config.to_dict(),
        "largest_relative_error": errors,
        "densities": asdict(densities),
        **results,
    }
    write_report(arguments.out / "kernels-cpu.json", report)
    draw(arguments.out, report)
    print(json.dumps(report, indent=2))


def draw(folder: Path, report: dict[str, Any]) -> None:
    passes, decode = report["passes"], report["decode"]
    bars(
        folder / "kernels-passes.svg",
        f"A decode step of {decode['batch']} sequences, pass by pass",
        "ms",
        {name: figures["ms"] for name, figures in passes.items()},
        {name: f"{figures['percent_of_rate']:.0f} % of its rate" for name, figures in passes.items()},
    )
    rates = {name.removesuffix("_tokens_per_s"): rate for name, rate in decode.items() if name.endswith("tokens_per_s")}
    bars(
        folder / "kernels-decode.svg",
        f"Decoding {decode['batch']} sequences",
        "tokens/s",
        rates,
        {name: f"{rate:,.0f} tokens/s" for name, rate in rates.items()},
        log=True,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="a model folder; without it, synthetic weights of the bundled shape")
    parser.add_argument("--text", type=Path, help="a file whose bytes are the tokens; without it, random ones")
    parser.add_argument("--density", type=float, default=0.22, help="share of neurons that fire, of synthetic weights")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=512, help="that is recomputed for every token, upstream's way")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(argv)


def read_tokens(text: Path | None, vocabulary: int, count: int) -> Tensor:
    if text is None:
        return torch.randint(0, vocabulary, (count,))
    read = torch.tensor(list(text.read_bytes()[:count]))
    return read.repeat(-(-count // len(read)))[:count]


def ragged(tokens: Tensor, batch: int, start: int, length: int) -> RaggedBatch:
    """The tokens at `start` … of `batch` sequences, which lie 1,024 tokens apart."""
    return RaggedBatch(
        tokens=torch.cat([tokens[1024 * s + start : 1024 * s + start + length] for s in range(batch)]),
        positions=torch.arange(start, start + length).repeat(batch),
        bounds=[length * s for s in range(batch + 1)],
        slots=list(range(batch)),
    )


def disagreement(config: BDHConfig, weights: Weights, tokens: Tensor, dtype: torch.dtype) -> float:
    """The largest relative error over a prefill, a decode step, and the states after them."""
    variants: list[list[Tensor]] = []
    for kernels in (TorchKernels(weights), CpuKernels(weights)):
        states = StatePool(config, CHECKED, CPU, dtype=dtype).states.zero_()
        variants.append(
            [kernels.logits(kernels.forward(states, ragged(tokens, CHECKED, *at))) for at in ((0, 64), (64, 1))]
        )
        variants[-1].append(states)
    return relative_error(variants[1], variants[0])


def measure_densities(weights: Weights, tokens: Tensor) -> Densities:
    """What fires in the specification for one sequence."""
    cos, sin = rotation(weights.frequencies, torch.arange(len(tokens)))
    _, heads, width, neurons = weights.encoder.shape
    x = layer_norm(weights.embed[tokens].float())
    counts = torch.zeros(3)
    for _ in range(weights.layers):
        fired = project(x, weights.encoder[0]).relu()
        y = attend_segment(rotate(fired, cos, sin), x, torch.zeros(heads, neurons, width))
        gated = fired * project(layer_norm(y), weights.encoder_v[0]).relu()
        pairs = torch.maximum(fired[..., ::2], fired[..., 1::2])
        counts += torch.stack([(values > 0).float().mean() for values in (fired, pairs, gated)])
        x = layer_norm(x + layer_norm(project(gated.transpose(0, 1).flatten(1), weights.decoder[0])))
    return Densities(*(counts / weights.layers).tolist())


def variants_of(name: str) -> list[tuple[str, str]]:
    """The variants that differ by the dtype of the states only, each with that dtype."""
    return [("float32", name), ("bfloat16", f"{name}_bfloat16")]


class Bench:
    def __init__(
        self, config: BDHConfig, weights: Weights, tokens: Tensor, batch: int, densities: Densities, repeats: int
    ) -> None:
        self._config, self._weights, self._tokens = config, weights, tokens
        self._batch, self._densities, self._repeats = batch, densities, repeats
        self._kernels = CpuKernels(weights)
        # Zeros, written here, so that no variant is the first to touch its memory.
        self._states = {
            name: StatePool(config, batch, CPU, dtype=dtype).states.zero_() for name, dtype in STATES.items()
        }
        self._dense_states, self._batched_states = (StatePool(config, batch, CPU).states.zero_() for _ in range(2))
        self._position = 64

    def run(self, context: int, prompt: int) -> dict[str, Any]:
        machine_tests, rates = machine_variants()
        dense = TorchKernels(self._weights)
        for states in self._states.values():
            self._kernels.forward(states, ragged(self._tokens, self._batch, 0, 64))
        contexts = torch.stack([self._tokens[1024 * s : 1024 * s + context] for s in range(self._batch)])
        passes = pass_variants(self._kernels, self._states, ragged(self._tokens, self._batch, 64, 1))
        variants = {
            **machine_tests,
            "dense_per_sequence": lambda: self._step(dense, self._dense_states),
            "dense_batched": self._batched_step,
            "prefill": lambda: self._prefill(prompt, self._states["float32"]),
            "prefill_bfloat16": lambda: self._prefill(prompt, self._states["bfloat16"]),
            "step_bfloat16": lambda: self._step(self._kernels, self._states["bfloat16"]),
            "step": lambda: self._step(self._kernels, self._states["float32"]),  # leaves its lists to the passes
            **passes,
        }
        with tqdm(total=self._repeats, desc=", ".join(variants), file=sys.stderr) as bar:
            rounds = take_turns(variants, self._repeats, tick=bar.update)
        times = medians(rounds)
        whole = {"recompute": lambda: recompute(self._weights, contexts, 1)}
        times["recompute"] = alternate(whole, min(3, self._repeats))["recompute"]
        machine = rates(times)
        return {
            "machine_rates": asdict(machine),
            "decode": self._decode(times, context),
            "figures": {
                name: figure([tokens / seconds for seconds in rounds[name]], "tokens/s", "higher")
                for name, tokens in {
                    **dict.fromkeys(("step", "step_bfloat16", "dense_per_sequence", "dense_batched"), self._batch),
                    **dict.fromkeys(("prefill", "prefill_bfloat16"), prompt),
                }.items()
            },
            "passes": self._pass_figures(times, machine),
            "prefill": {
                "tokens": prompt,
                **{
                    name: self._prefill_figures(prompt, times[variant], machine)
                    for name, variant in variants_of("prefill")
                },
            },
        }

    def _next(self) -> RaggedBatch:
        self._position = 64 + (self._position + 1) % 512
        return ragged(self._tokens, self._batch, self._position, 1)

    def _step(self, kernels: Kernels, states: Tensor) -> None:
        kernels.logits(kernels.forward(states, self._next()))

    def _batched_step(self) -> None:
        dense_batched(self._weights, self._batched_states, self._next())

    def _prefill(self, prompt: int, states: Tensor) -> None:
        for start in range(0, prompt, CHUNK):
            end = min(start + CHUNK, prompt)
            batch = RaggedBatch(self._tokens[start:end], torch.arange(start, end), [0, end - start], [0])
            self._kernels.forward(states, batch)

    def _decode(self, times: dict[str, float], context: int) -> dict[str, float]:
        baselines = {
            "dense_per_sequence": times["dense_per_sequence"],
            "dense_batched": times["dense_batched"],
            f"recompute_at_{context}": times["recompute"],
        }
        return {
            "batch": self._batch,
            **{f"{variant}_tokens_per_s": self._batch / times[variant] for _, variant in variants_of("step")},
            **{f"{name}_tokens_per_s": self._batch / seconds for name, seconds in baselines.items()},
            **{
                f"{variant}_times_{name}": seconds / times[variant]
                for _, variant in variants_of("step")
                for name, seconds in baselines.items()
            },
        }

    def _pass_figures(self, times: dict[str, float], machine: Machine) -> dict[str, dict[str, float | str]]:
        shape = self._kernels._shape
        threads, pieces = self._kernels._threads, shape.layers * shape.heads
        rows = 0
        for thread in range(threads):  # each goes by the lists in its own scratch buffers for all of its pieces
            lists = self._kernels._scratch.starts[thread].reshape(-1, shape.panels + 1)[: self._batch, -1]
            rows += 2 * int(lists.sum()) * len(range(thread, pieces, threads))
        products = 2 * self._batch * shape.layers * shape.heads * shape.neurons * shape.width
        return {
            "expand": {
                "ms": times["expand"] * 1e3,
                "rate": "one product at the rate of large ones",
                "percent_of_rate": 100 * products / times["expand"] / 1e9 / machine.gemm_gflop_s,
            },
            **{
                variant: self._attend_figures(2 * STATES[name].itemsize * shape.width * rows, times[variant], machine)
                for name, variant in variants_of("attend")
            },
            "contract": {
                "ms": times["contract"] * 1e3,
                "rate": "the gates of what fired and the rows of what passed, at the rate of large products",
                "percent_of_rate": 100
                * (products * (self._densities.fired + self._densities.gated))
                / times["contract"]
                / 1e9
                / machine.gemm_gflop_s,
            },
        }

    def _attend_figures(self, moved: int, seconds: float, machine: Machine) -> dict[str, float | str]:
        return {
            "ms": seconds * 1e3,
            "state_bytes_read_and_written": moved,
            "gb_s": moved / seconds / 1e9,
            "rate": "the rows that fired at copy bandwidth",
            "percent_of_rate": 100 * moved / seconds / 1e9 / machine.copy_gb_s,
        }

    def _prefill_figures(self, prompt: int, seconds: float, machine: Machine) -> dict[str, float]:
        """Useful operations have no factor that is zero because a neuron did not fire; dense ones are all of them."""
        shape, d = self._kernels._shape, self._densities
        product = 2 * prompt * shape.layers * shape.heads * shape.neurons * shape.width
        useful = product * (1 + 2 * d.pairs + d.fired + d.gated)
        return {
            "tokens_per_s": prompt / seconds,
            "useful_gflop_s": useful / seconds / 1e9,
            "useful_percent_of_gemm_rate": 100 * useful / seconds / 1e9 / machine.gemm_gflop_s,
            "dense_percent_of_gemm_rate": 100 * 5 * product / seconds / 1e9 / machine.gemm_gflop_s,
        }


if __name__ == "__main__":
    main()
