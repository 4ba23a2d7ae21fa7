"""What to run on a machine with a GPU, one command: tests the Triton kernels on it, tunes them, measures them.

    python -m benchmarks.engine.gpu_check  # everything; --model bundled, --skip-tests, --skip-tuning for less

Needs torch, triton, numpy, numba, pytest and safetensors. Measures decode steps of the bundled model's shape and of
upstream's default one, with weights that fire as trained ones do, against the machine's copy bandwidth, the dense
recurrence in torch and recomputing, which alternate. Prints no speed while a result is wrong. Exits 2 without a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.kernels.base import Kernels, RaggedBatch, Weights
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.kernels.tuning import FILE, Blocks, load_blocks, save_blocks, search
from benchmarks import ROOT
from benchmarks.common import alternate
from benchmarks.engine.dense import dense_batched, recompute
from benchmarks.engine.synthetic import synthetic_weights
from benchmarks.report import report_head, results_folder, write_report

MODELS = {
    "bundled": BDHConfig(n_layer=6, n_embd=128, n_head=4, mlp_internal_dim_multiplier=32, vocab_size=256),
    "upstream": BDHConfig(n_layer=6, n_embd=256, n_head=4, mlp_internal_dim_multiplier=128, vocab_size=256),
}
DENSITY = 0.12  # of neurons that fire: 9 – 15 % in trained models of 25M – 100M
BATCHES = [1, 4, 16, 64, 256, 512, 1024]
TUNED_FOR = [16, 256]  # sequences of the decode steps that block sizes are chosen by
CONTEXT = 512  # that is recomputed
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
HEADROOM = 6 << 30  # bytes that are not for states
GPU = torch.device("cuda")


def main() -> int:
    arguments = parse()
    if not torch.cuda.is_available():
        print("gpu-check: there is no GPU on this machine, nothing was measured")
        return 2
    gpu = torch.cuda.get_device_name()
    head = report_head(["torch", "triton"], gpu=gpu, capability=torch.cuda.get_device_capability())
    if not arguments.skip_tests and not tests_pass():
        print("gpu-check: the kernel tests fail on this GPU: no speed is worth printing")
        return 1
    with torch.inference_mode():
        bandwidth = copy_bandwidth()
        results = {}
        for name in arguments.model or MODELS:
            if (wrong := errors(MODELS[name])) is not None:
                print(f"gpu-check: {name}: {wrong}: no speed is worth printing")
                return 1
            results[name] = check_model(name, MODELS[name], bandwidth, not arguments.skip_tuning)
    file = arguments.out / f"gpu-{gpu.lower().replace(' ', '-')}.json"
    write_report(file, {**head, "copy_gb_s": bandwidth / 1e9, "density": DENSITY, "models": results})
    print(f"copy {bandwidth / 1e9:.0f} GB/s; written to {file}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tests, tunes and measures the Triton kernels on this machine's GPU.")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this shape; may be repeated")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-tuning", action="store_true", help="with the block sizes that are on file")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args()


def tests_pass() -> bool:
    """Without the project's pytest settings, which name plugins that a GPU machine need not have."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    names = [f"tests/kernels/test_triton{part}.py" for part in ("", "_properties")]
    options = [
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        str(ROOT),
        "--confcutdir",
        "tests/kernels",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([sys.executable, "-m", "pytest", *options, *names], cwd=ROOT, env=environment)
    return done.returncode == 0


def weights_for(config: BDHConfig, dtype: torch.dtype) -> Weights:
    made = synthetic_weights(config, DENSITY, dtype=dtype)
    names = ("embed", "encoder", "encoder_v", "decoder", "lm_head", "frequencies")
    return replace(made, **{name: getattr(made, name).to(GPU) for name in names})


def states_for(config: BDHConfig, slots: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Not zeros, on which arithmetic can be faster."""
    shape = (slots, config.n_layer, config.n_head, config.neurons_per_head, config.n_embd)
    states = torch.empty(shape, dtype=dtype, device=GPU)
    for state in states:
        state.normal_()
    return states


def ragged(sequences: int, start: int, length: int, vocabulary: int) -> RaggedBatch:
    generator = torch.Generator().manual_seed(start)
    return RaggedBatch(
        tokens=torch.randint(0, vocabulary, (sequences * length,), generator=generator).to(GPU),
        positions=torch.arange(start, start + length, device=GPU).repeat(sequences),
        bounds=[length * s for s in range(sequences + 1)],
        slots=list(range(sequences)),
    )


def errors(config: BDHConfig) -> str | None:
    """What is wrong with a prefill and some decode steps, by either dtype of weights and states, on this very shape."""
    from bdh_batch.kernels.cuda import TritonKernels

    for dtype, state_dtype in product(TOLERANCES, repeat=2):
        tolerance, kind = max(TOLERANCES[dtype], TOLERANCES[state_dtype]), f"{dtype} weights and {state_dtype} states"
        weights = weights_for(config, dtype)
        variants: list[list[Tensor]] = []
        for kernels in (TorchKernels(weights), TritonKernels(weights)):
            states = torch.zeros_like(states_for(config, 3, state_dtype))
            steps = [ragged(3, start, length, config.vocab_size) for start, length in ((0, 100), (100, 1), (101, 1))]
            variants.append([*(kernels.logits(kernels.forward(states, step)) for step in steps), states.float()])
        error = max(float((mine - right).norm() / right.norm()) for right, mine in zip(*variants))
        print(f"largest relative error with {kind}: {error:.1e}")
        if not error <= tolerance:
            return f"{error:.1e} off the specification with {kind}, where {tolerance:.0e} is allowed"
    return None


def check_model(name: str, config: BDHConfig, bandwidth: float, tune: bool) -> dict[str, Any]:
    weights = weights_for(config, torch.bfloat16)
    blocks = tuned(config, weights) if tune else stored_blocks(weights)
    figures: dict[str, Any] = {"model": config.to_dict(), "blocks": asdict(blocks), "decode": []}
    for dtype in (torch.float32, torch.bfloat16):
        figures["decode"] += list(decode_figures(name, config, weights, blocks, dtype, bandwidth))
    return figures


def tuned(config: BDHConfig, weights: Weights) -> Blocks:
    """Searched on decode steps of few and many sequences and on a prompt, and put on file."""
    from triton.runtime.errors import OutOfResources

    from bdh_batch.kernels.cuda import TritonKernels

    states = states_for(config, min(max(TUNED_FOR), most_slots(config, torch.float32)))

    def cost(blocks: Blocks) -> float:
        kernels = TritonKernels(weights, blocks=blocks)
        work = [ragged(min(size, len(states)), 900, 1, config.vocab_size) for size in TUNED_FOR]
        work.append(ragged(1, 0, 2048, config.vocab_size))
        try:
            times = alternate({str(i): step(kernels, states, batch) for i, batch in enumerate(work)}, 7, gpu_clock)
        except OutOfResources:
            return math.inf
        print(f"  {blocks}: " + ", ".join(f"{seconds * 1e3:.3f} ms" for seconds in times.values()))
        return sum(math.log(seconds) for seconds in times.values())

    best = search(cost)
    save_blocks(key(weights), best)
    print(f"kept in {FILE}: {best}")
    return best


def key(weights: Weights) -> str:
    from bdh_batch.kernels.cuda import TritonKernels, key_for

    return key_for(weights.embed.device, TritonKernels(weights, max_tokens=1)._shape)


def stored_blocks(weights: Weights) -> Blocks:
    return load_blocks(key(weights))


def most_slots(config: BDHConfig, dtype: torch.dtype) -> int:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return int((free - HEADROOM) // (config.state_elements * dtype.itemsize))


def decode_figures(
    name: str, config: BDHConfig, weights: Weights, blocks: Blocks, dtype: torch.dtype, bandwidth: float
) -> Iterator[dict[str, Any]]:
    from bdh_batch.kernels.cuda import TritonKernels

    kernels = TritonKernels(weights, blocks=blocks)
    states = states_for(config, min(max(BATCHES), most_slots(config, dtype)), dtype)
    for size in (size for size in BATCHES if size <= len(states)):
        batch = ragged(size, 900, 1, config.vocab_size)
        variants: dict[str, Callable[[], object]] = {"triton": step(kernels, states, batch)}
        if dtype == torch.float32:
            variants["dense"] = partial(dense_batched, weights, states[:size], batch)
        if dtype == torch.float32 and size <= 64:
            contexts = ragged(size, 0, CONTEXT, config.vocab_size).tokens.view(size, CONTEXT)
            variants["recompute"] = partial(recompute, weights, contexts)
        times = alternate(variants, 15, gpu_clock)
        moved = rows_moved(kernels, states, batch) * 2 * config.n_embd * dtype.itemsize
        figures = {
            "sequences": size,
            "states": str(dtype).removeprefix("torch."),
            "ms": times["triton"] * 1e3,
            **{f"{variant}_tokens_per_s": size / seconds for variant, seconds in times.items()},
            "state_bytes_read_and_written": moved,
            "percent_of_copy_bandwidth": 100 * moved / times["triton"] / bandwidth,
        }
        print(
            f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        )
        yield figures
        states.normal_()  # so many equal tokens would make it grow


def step(kernels: Kernels, states: Tensor, batch: RaggedBatch) -> Callable[[], Tensor]:
    return lambda: kernels.logits(kernels.forward(states, batch))


def rows_moved(kernels: Any, states: Tensor, batch: RaggedBatch) -> int:
    """State rows whose pair fired in all layers of a decode step; each is read and written."""
    from bdh_batch.kernels.cuda import upload

    part = upload(batch.tokens, batch.positions, batch.bounds, batch.slots, [True] * len(batch.slots))
    kernels.begin(part)
    rows = 0
    for layer in range(states.shape[1]):
        kernels.compute_layer(layer, states, part)
        rows += 2 * int(kernels._work.counts[: len(batch.tokens)].sum())
    return rows


def gpu_clock(variant: Callable[[], object]) -> float:
    """Seconds by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    variant()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a copy of 2 GB."""
    source, target = torch.randn(1 << 29, device=GPU), torch.empty(1 << 29, device=GPU)
    return 2 * source.nbytes / alternate({"copy": lambda: target.copy_(source)}, 15, gpu_clock)["copy"]


if __name__ == "__main__":
    sys.exit(main())
