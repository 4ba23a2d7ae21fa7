"""Whether it pays to write a state only every R tokens, and to keep the tokens since then in a ring: an experiment.

    python -m benchmarks.engine.ring

A token then reads the rows that it fired, y = q · S + Σ (q · q_j) x_j over the ring's tokens j, and writes its own q
and x into the ring. Every R tokens the ring is added to S, panel by panel, as a prompt is. The kernels read and write
the rows of a token in one pass. The parts are timed with the bundled model's lists of what fires, over all layers and
heads of a batch of sequences, on all threads. Writes `ring.json`: for each batch and R the microseconds a token of

    in_place    the pass as it is
    read        the same without writing
    dots        q · q_j of half a ring, and its share of y
    flush       adding a ring to the state, over R tokens
    ratio       in_place to the sum of the others; above 1 the ring wins
    by_bytes    the same by the bytes of rows and rings that move alone
    fired       the share of the rows that a token reads, and `union` that which a flush writes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.kernels import cpu, cpu_state, cpu_step, simd, simd_state, simd_terms as terms
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.cpu_layout import PANEL, Floats, Round, Scratch, Shape, States, Work
from bdh_batch.kernels.vector import LANES, compiled, in_parallel, inlined
from benchmarks import ROOT
from benchmarks.common import figure, ratio, take_turns
from benchmarks.engine.passes import attend_all, fill_lists, one_token_each
from benchmarks.report import report_head, results_folder, write_report

BUNDLED = ROOT / "models" / "bdh-shakespeare"
TEXT = ROOT / "tests" / "data" / "shakespeare-validation.txt"
LISTS = 32  # tokens whose lists of what fires are used
BEGUN = 256  # tokens before them


class Ring(NamedTuple):
    """The last tokens of sequences, in panels as `Scratch.fired` has them."""

    q: Floats  # [S, layers, heads, R, N]
    x: Floats  # [S, layers, R, D]


@compiled
def read_share(
    thread: int, threads: int, part: Round, shape: Shape, states: States, work: Work, scratches: Scratch
) -> None:
    scratch = cpu_step.scratch_of(scratches, thread)
    for piece in range(thread, shape.layers * shape.heads, threads):
        for segment in range(len(part.slots)):
            cpu_state.read_token(segment, state_of(segment, piece, part, shape), shape, states, work, scratch)


@inlined
def state_of(segment: int, piece: int, part: Round, shape: Shape) -> Any:
    return (part.slots[segment] * shape.layers * shape.heads + piece) * shape.neurons * shape.width


@compiled
def dots_share(
    thread: int, threads: int, filled: int, size: int, part: Round, shape: Shape, ring: Ring, scratches: Scratch
) -> None:
    """y += Σ (q · q_j) x_j over `filled` of the `size` tokens of each ring; then the token goes into it."""
    scratch = cpu_step.scratch_of(scratches, thread)
    for piece in range(thread, shape.layers * shape.heads, threads):
        for segment in range(len(part.slots)):
            q = (part.slots[segment] * shape.layers * shape.heads + piece) * size * shape.neurons
            x = (part.slots[segment] * shape.layers + piece // shape.heads) * size * shape.width
            fired, y = segment * shape.fired_pitch, segment * shape.pitch
            for j in range(filled):
                sums = simd.splat(np.float32(0))
                for i in range(0, shape.neurons, LANES):
                    q_j = simd.load(ring.q, q + j * shape.neurons + i)
                    sums = simd.fma(simd.load(scratch.fired, fired + i), q_j, sums)
                weight = simd.splat(simd.total(sums))
                for i in range(0, shape.width, LANES):
                    x_j = simd.load(ring.x, x + j * shape.width + i)
                    simd.store(scratch.y, y + i, simd.fma(weight, x_j, simd.load(scratch.y, y + i)))
            for i in range(0, shape.neurons, LANES):
                simd.store(ring.q, q + filled * shape.neurons + i, simd.load(scratch.fired, fired + i))


@compiled
def flush_share(
    thread: int, threads: int, size: int, part: Round, shape: Shape, states: States, work: Work, scratches: Scratch
) -> None:
    """S += Σ q_j ⊗ x_j over a ring's tokens, a panel of rows at a time: `cpu_state.attend_tokens` without reading."""
    scratch = cpu_step.scratch_of(scratches, thread)
    for piece in range(thread, shape.layers * shape.heads, threads):
        for segment in range(len(part.slots)):
            state = state_of(segment, piece, part, shape)
            for panel in range(shape.panels):
                for j in range(size):
                    cursor = j * (shape.panels + 1) + panel
                    first = j * shape.list_pitch
                    for entry in range(first + scratch.starts[cursor], first + scratch.starts[cursor + 1]):
                        write_pair(states, state, j * shape.pitch, entry, shape.width, work, scratch)


@inlined
def write_pair(states: States, state: int, x: int, entry: int, width: int, work: Work, scratch: Scratch) -> None:
    """Widths that fill panels alone."""
    even, odd = terms.spread(scratch.even, entry), terms.spread(scratch.odd, entry)
    at = state + 2 * width * scratch.pairs[entry]
    none = simd_state.half()
    for i in range(0, width, PANEL):
        x0, x1 = simd.load(work.x, x + i), simd.load(work.x, x + i + LANES)
        first, second = simd_state.load_two(states, at + i)
        simd_state.store_two(states, at + i, simd.fma(even, x0, first), simd.fma(even, x1, second), none)
        first, second = simd_state.load_two(states, at + width + i)
        simd_state.store_two(states, at + width + i, simd.fma(odd, x0, first), simd.fma(odd, x1, second), none)


@in_parallel
def read_all(part: Round, shape: Shape, states: States, work: Work, scratches: Scratch, threads: int) -> None:
    for thread in numba.prange(threads):
        read_share(thread, threads, part, shape, states, work, scratches)


@in_parallel
def dots_all(
    filled: int, size: int, part: Round, shape: Shape, ring: Ring, scratches: Scratch, threads: int
) -> None:  # fmt: skip
    for thread in numba.prange(threads):
        dots_share(thread, threads, filled, size, part, shape, ring, scratches)


@in_parallel
def flush_all(
    size: int, part: Round, shape: Shape, states: States, work: Work, scratches: Scratch, threads: int
) -> None:  # fmt: skip
    for thread in numba.prange(threads):
        flush_share(thread, threads, size, part, shape, states, work, scratches)


class Bench:
    def __init__(self, model: Path) -> None:
        weights = load_model(model, torch.float32, torch.device("cpu")).weights
        self._kernels = kernels = CpuKernels(weights)
        self._shape, self._work, self._scratches = kernels._shape, kernels._work, kernels._scratch
        self._threads = kernels._threads
        self._text = torch.tensor(list(TEXT.read_bytes()[: BEGUN + LISTS]))
        if self._shape.width % PANEL or self._shape.neurons % PANEL:
            raise SystemExit(f"--model: its width and its neurons of a head should be multiples of {PANEL}")
        fill_lists(kernels, self._text, BEGUN)

    def union(self, size: int) -> float:
        """The share of the rows that `size` tokens fire together, in the mean over the lists."""
        shape, pairs, starts = self._shape, self._scratches.pairs[0], self._scratches.starts[0]
        lists = [
            set(pairs[row * shape.list_pitch :][: starts[(row + 1) * (shape.panels + 1) - 1]].tolist())
            for row in range(LISTS)
        ]
        groups = [set().union(*lists[at : at + size]) for at in range(0, LISTS, size)]
        return 2 * sum(map(len, groups)) / len(groups) / shape.neurons

    def by_bytes(self, size: int) -> float:
        """In rows: a token's are read and written, or read, with its share of a flush and of half a ring, which for
        each of its tokens holds a number where the state has a row."""
        fired = self.union(1)
        return 2 * fired / (fired + 2 * self.union(size) / size + (size / 2 + 1) / self._shape.width)

    def measure(self, batch: int, sizes: list[int], repeats: int) -> list[dict[str, Any]]:
        shape, work, scratches, threads = self._shape, self._work, self._scratches, self._threads
        one = one_token_each(self._text[:batch], BEGUN)
        (part,) = cpu.rounds(one, cpu.cut(one, 1, 1))
        flat = cpu.flatten(torch.zeros(batch, shape.layers, shape.heads, shape.neurons, shape.width))
        steps = max(1, LISTS // batch)  # of one variant in each timed run
        variants: dict[str, Callable[[], object]] = {
            "in_place": partial(attend_all, part, shape, flat, work, scratches, threads),
            "read": partial(read_all, part, shape, flat, work, scratches, threads),
        }
        for size in sizes:
            tokens = batch * shape.layers * size
            ring = Ring(
                np.ones(tokens * shape.heads * shape.neurons, np.float32), np.ones(tokens * shape.width, np.float32)
            )
            variants[f"dots {size}"] = partial(dots_all, size // 2, size, part, shape, ring, scratches, threads)
            variants[f"flush {size}"] = partial(flush_all, size, part, shape, flat, work, scratches, threads)
        times = take_turns({name: partial(often, run, steps) for name, run in variants.items()}, repeats)
        each = {name: [1e6 * seconds / steps / batch for seconds in found] for name, found in times.items()}
        rows = []
        for size in sizes:
            flush = [found / size for found in each[f"flush {size}"]]
            parts = {"in_place": each["in_place"], "read": each["read"], "dots": each[f"dots {size}"], "flush": flush}
            ringed = [sum(found) for found in zip(each["read"], each[f"dots {size}"], flush)]
            rows.append(
                {
                    "batch": batch,
                    "ring": size,
                    "fired": self.union(1),
                    "union": self.union(size),
                    "by_bytes": self.by_bytes(size),
                    **{name: figure(found, "µs", "lower") for name, found in parts.items()},
                    "ratio": asdict(ratio(each["in_place"], ringed)),
                }
            )
        return rows


def often(run: Callable[[], object], steps: int) -> None:
    for _ in range(steps):
        run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a model folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rings", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", type=Path, default=results_folder())
    arguments = parser.parse_args()
    if max(*arguments.batches, *arguments.rings) > LISTS:
        parser.error(f"--batches, --rings: at most {LISTS}")
    head, bench = report_head(["torch", "numba"]), Bench(arguments.model)
    rows = [row for batch in arguments.batches for row in bench.measure(batch, arguments.rings, arguments.repeats)]
    write_report(arguments.out / "ring.json", {**head, "model": arguments.model.name, "rings": rows})
    for row in rows:
        print({name: value["value"] if isinstance(value, dict) else value for name, value in row.items()})


if __name__ == "__main__":
    main()
