"""What to run on a machine with a GPU, one command: tests the Triton kernels on it, tunes them, measures them.

    python -m benchmarks.engine.gpu_check  # everything; --model bundled, --skip-tests, --skip-tuning for less

Needs torch, triton, numpy, numba, pytest, safetensors and msgspec. Measures decode steps of the bundled model's shape
and of upstream's default one, with weights that fire as trained ones do, against the machine's copy bandwidth, the
dense recurrence in torch and recomputing, which alternate, and what was estimated. Prints no speed while a result is
wrong.
Takes at most about 10 minutes (--minutes), in parts; the report is written whenever one ends. What finds no memory is
noted and left out. Exits 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
from benchmarks.engine.gpu_graphs import SIZES, decode_step, differing_draws
from benchmarks.engine.synthetic import synthetic_weights
from benchmarks.report import RESULTS, report_head, results_folder, write_report

MODELS = {
    "bundled": BDHConfig(n_layer=6, n_embd=128, n_head=4, mlp_internal_dim_multiplier=32, vocab_size=256),
    "upstream": BDHConfig(n_layer=6, n_embd=256, n_head=4, mlp_internal_dim_multiplier=128, vocab_size=256),
}
DENSITY = 0.12  # of neurons that fire: 9 – 15 % in trained models of 25M – 100M
BATCHES = [1, 4, 16, 32, 64, 256, 1024]
TUNED_FOR = [16, 256]  # sequences of the decode steps that block sizes are chosen by
CONTEXT = 512  # that is recomputed
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
HEADROOM = 6 << 30  # bytes that are not for states
TUNING_SECONDS = 120.0  # of one model
GPU = torch.device("cuda")


Figures = dict[str, Any]
Part = Callable[[float], Figures]  # is given the seconds that are left to it


class WrongResultError(Exception):
    """A kernel computes something else than the specification: no speed is worth printing."""


def main() -> int:
    arguments = parse()
    if not torch.cuda.is_available():
        print("gpu-check: there is no GPU on this machine, nothing was measured")
        return 2
    gpu = torch.cuda.get_device_name()
    head = report_head(["torch", "triton"], gpu=gpu, capability=torch.cuda.get_device_capability())
    file = arguments.out / f"gpu-{gpu.lower().replace(' ', '-')}.json"

    def write(found: Figures) -> None:
        write_report(file, {**head, "density": DENSITY, "parts": found})

    with torch.inference_mode():
        try:
            run_parts(parts(arguments), 60 * arguments.minutes, write)
        except WrongResultError as wrong:
            print(f"gpu-check: {wrong}: no speed is worth printing")
            return 1
    print(f"written to {file}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tests, tunes and measures the Triton kernels on this machine's GPU.")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this shape; may be repeated")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-tuning", action="store_true", help="with the block sizes that are on file")
    parser.add_argument("--minutes", type=float, default=10, help="after which no part begins; what ran is kept")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args()


def parts(arguments: argparse.Namespace) -> dict[str, Part]:
    """By name, in their order: what is right comes before what is fast."""
    models = {name: MODELS[name] for name in arguments.model or MODELS}
    found: dict[str, Part] = {} if arguments.skip_tests else {"tests": tests_part}
    for name, config in models.items():
        found[f"{name}, errors"] = partial(errors_part, name, config)
        found[f"{name}, graphs"] = partial(graphs_part, name, config)
    for name, config in models.items():
        if not arguments.skip_tuning:
            found[f"{name}, tuning"] = partial(tuning_part, config)
        for dtype in (torch.bfloat16, torch.float32):
            found[f"{name}, decode, {str(dtype).removeprefix('torch.')} states"] = partial(
                decode_part, name, config, dtype
            )
    return found


def run_parts(
    parts: Mapping[str, Part],
    seconds: float,
    write: Callable[[Figures], None],
    clock: Callable[[], float] = time.monotonic,
) -> Figures:
    """Runs parts in their order and writes what there is whenever one ends. One that finds no memory is noted, and so
    is one for which there is no time left; the others run all the same.

    Raises:
        WrongResultError: of a part. What was found until then, and that, is written.
    """
    found: Figures = {}
    began = clock()
    for name, part in parts.items():
        left = seconds - (clock() - began)
        start = clock()
        try:
            found[name] = part(left) if left > 0 else {"left_out": "no time was left"}
        except WrongResultError as wrong:
            found[name] = {"wrong": str(wrong)}
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            found[name] = {"out_of_memory": str(error).partition("\n")[0]}
        finally:
            found.setdefault(name, {})["seconds"] = clock() - start
            write(found)
    return found


def tests_part(left: float) -> Figures:
    if not tests_pass(left):
        raise WrongResultError("the kernel tests fail on this GPU, or take longer than there is time")
    return {"passed": True}


def errors_part(name: str, config: BDHConfig, left: float) -> Figures:
    if (wrong := errors(config)) is not None:
        raise WrongResultError(f"{name}: {wrong}")
    return {"passed": True}


def graphs_part(name: str, config: BDHConfig, left: float) -> Figures:
    from bdh_batch.kernels.cuda import TritonKernels

    slots = min(max(SIZES), most_slots(config, torch.bfloat16) // 2)
    kernels, states = TritonKernels(weights_for(config, torch.bfloat16)), states_for(config, slots, torch.bfloat16)
    found = differing_draws(kernels, states, config.vocab_size)
    if found["others"] or found["others_alone"] or not found["states_are_the_same"]:
        raise WrongResultError(
            f"{name}: graphs differ from their kernels one by one, or their draws from those of rows alone: {found}"
        )
    return found


def tuning_part(config: BDHConfig, left: float) -> Figures:
    return {"blocks": asdict(tuned(config, weights_for(config, torch.bfloat16), min(left, TUNING_SECONDS)))}


def decode_part(name: str, config: BDHConfig, dtype: torch.dtype, left: float) -> Figures:
    """As many sizes as there is time for."""
    until = time.monotonic() + left
    weights = weights_for(config, torch.bfloat16)
    blocks, bandwidth = stored_blocks(weights), copy_bandwidth()
    found: list[Figures] = []
    for figures in decode_figures(name, config, weights, blocks, dtype, bandwidth):
        found.append(figures)
        if time.monotonic() > until:
            break
    return {"model": config.to_dict(), "blocks": asdict(blocks), "copy_gb_s": bandwidth / 1e9, "decode": found}


def tests_pass(seconds: float) -> bool:
    """Whether they do, within so many seconds. Without the project's pytest settings, whose plugins a GPU machine need
    not have."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    names = [f"tests/kernels/test_triton{part}.py" for part in ("", "_decode", "_properties", "_runner")]
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
    command = [sys.executable, "-m", "pytest", *options, *names]
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        return False


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


def tuned(config: BDHConfig, weights: Weights, seconds: float) -> Blocks:
    """Searched on decode steps of few and many sequences and on a prompt, and put on file.

    What there is no time for is not tried.
    """
    from triton.runtime.errors import OutOfResources

    from bdh_batch.kernels.cuda import TritonKernels

    states = states_for(config, min(max(TUNED_FOR), most_slots(config, torch.float32)))
    until = time.monotonic() + seconds

    def cost(blocks: Blocks) -> float:
        if time.monotonic() > until:
            return math.inf
        kernels = TritonKernels(weights, blocks=blocks)
        sizes = [min(size, len(states)) for size in TUNED_FOR]
        work = [decode_step(kernels, states, ragged(size, 900, 1, config.vocab_size)) for size in sizes]
        work.append(step(kernels, states, ragged(1, 0, 2048, config.vocab_size)))
        try:
            times = alternate({str(i): each for i, each in enumerate(work)}, 7, gpu_clock)
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
    estimated = on_paper()
    for size in (size for size in BATCHES if size <= len(states)):
        batch = ragged(size, 900, 1, config.vocab_size)
        variants: dict[str, Callable[[], object]] = {"triton": decode_step(kernels, states, batch)}
        if dtype == torch.float32:
            variants["dense"] = partial(dense_batched, weights, states[:size], batch)
        if dtype == torch.float32 and size <= 64:
            contexts = ragged(size, 0, CONTEXT, config.vocab_size).tokens.view(size, CONTEXT)
            variants["recompute"] = partial(recompute, weights, contexts)
        without = out_of_memory(variants)
        if "triton" in without:
            yield {"sequences": size, "out_of_memory": without}
            continue
        times = alternate({name: each for name, each in variants.items() if name not in without}, 15, gpu_clock)
        moved = rows_moved(kernels, states, batch) * 2 * config.n_embd * dtype.itemsize
        figures = {
            "sequences": size,
            "states": str(dtype).removeprefix("torch."),
            "ms": times["triton"] * 1e3,
            **{f"{variant}_tokens_per_s": size / seconds for variant, seconds in times.items()},
            "state_bytes_read_and_written": moved,
            "percent_of_copy_bandwidth": 100 * moved / times["triton"] / bandwidth,
            "out_of_memory": without,
        }
        if name == "upstream" and dtype == torch.bfloat16 and size in estimated:
            figures["ms_on_paper"] = estimated[size]
        print(
            f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        )
        yield figures
        states.normal_()  # so many equal tokens would make it grow


def out_of_memory(variants: Mapping[str, Callable[[], object]]) -> list[str]:
    """Those that do not fit beside what is there."""
    found = []
    for name, variant in variants.items():
        try:
            variant()
        except torch.OutOfMemoryError:
            found.append(name)
            torch.cuda.empty_cache()
    return found


def on_paper() -> dict[int, float]:
    """Milliseconds that a decode step of upstream's model was estimated to take, by sequences; as far as it was."""
    kept = sorted(RESULTS.glob("*/suite/gpu-kernels.json"))
    rows = json.loads(kept[-1].read_text())["estimates"]["by_batch"] if kept else []
    return {row["batch"]: row["now"]["us"] / 1e3 for row in rows}


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
