"""The passes of a decode step by themselves, and the rates of this machine that they are measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numba
import torch
from torch import Tensor

from bdh_batch.kernels import cpu, cpu_passes, cpu_step, vector
from bdh_batch.kernels.base import RaggedBatch
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.cpu_layout import Packed, Round, Scratch, Shape, States, Work


@dataclass(frozen=True)
class Machine:
    copy_gb_s: float
    in_place_gb_s: float
    gemm_gflop_s: float


def machine_variants() -> tuple[dict[str, Callable[[], object]], Callable[[dict[str, float]], Machine]]:
    """A copy, a pass in place and a product to time, all on all threads, and what their times mean."""
    source, target = torch.zeros(1 << 26), torch.ones(1 << 26)
    a, b, out = torch.randn(1536, 1536), torch.randn(1536, 1536), torch.empty(1536, 1536)

    def rates(times: dict[str, float]) -> Machine:
        moved = 2 * source.nbytes / 1e9
        return Machine(moved / times["copy"], moved / times["in_place"], 2 * 1536**3 / times["gemm"] / 1e9)

    return {
        "copy": lambda: target.copy_(source),
        "in_place": lambda: target.add_(1),
        "gemm": lambda: torch.mm(a, b, out=out),
    }, rates


@vector.in_parallel
def expand_all(part: Round, shape: Shape, weights: Packed, work: Work, scratches: Scratch, threads: int) -> None:
    for thread in numba.prange(threads):
        expand_share(thread, threads, part, shape, weights, work, scratches)


@vector.in_parallel
def attend_all(part: Round, shape: Shape, states: States, work: Work, scratches: Scratch, threads: int) -> None:
    for thread in numba.prange(threads):
        attend_share(thread, threads, part, shape, states, work, scratches)


@vector.in_parallel
def contract_all(part: Round, shape: Shape, weights: Packed, work: Work, scratches: Scratch, threads: int) -> None:
    for thread in numba.prange(threads):
        contract_share(thread, threads, part, shape, weights, work, scratches)


@vector.compiled
def expand_share(
    thread: int, threads: int, part: Round, shape: Shape, weights: Packed, work: Work, scratches: Scratch
) -> None:
    scratch = cpu_step.scratch_of(scratches, thread)
    for piece in range(thread, shape.layers * shape.heads, threads):
        cpu_passes.expand(0, part.bounds[-1], piece // shape.heads, piece % shape.heads, shape, weights, work, scratch)


@vector.compiled
def attend_share(
    thread: int, threads: int, part: Round, shape: Shape, states: States, work: Work, scratches: Scratch
) -> None:
    """Every layer's and head's state by the lists in the scratch buffers."""
    scratch = cpu_step.scratch_of(scratches, thread)
    for piece in range(thread, shape.layers * shape.heads, threads):
        for segment in range(len(part.slots)):
            cpu_step.attend(segment, 0, piece // shape.heads, piece % shape.heads, part, shape, states, work, scratch)


@vector.compiled
def contract_share(
    thread: int, threads: int, part: Round, shape: Shape, weights: Packed, work: Work, scratches: Scratch
) -> None:
    scratch = cpu_step.scratch_of(scratches, thread)
    for piece in range(thread, shape.layers * shape.heads, threads):
        cpu_passes.contract(
            0, part.bounds[-1], piece // shape.heads, piece % shape.heads, shape, weights, work, scratch
        )


def one_token_each(tokens: Tensor, position: int) -> RaggedBatch:
    """A decode step of so many sequences, all at one position."""
    count = len(tokens)
    return RaggedBatch(tokens, torch.full((count,), position), range(count + 1), range(count))


def fill_lists(kernels: CpuKernels, text: Tensor, begun: int) -> None:
    """Leaves in every thread's scratch buffers what the tokens of a text from `begun` on fire, a row for each, in the
    last head of a layer after the last."""
    shape = kernels._shape
    states = torch.zeros(1, shape.layers, shape.heads, shape.neurons, shape.width)
    for begin, end in ((0, begun), (begun, len(text))):
        batch = RaggedBatch(text[begin:end], torch.arange(begin, end), [0, end - begin], [0])
        kernels.forward(states, batch)
    (part,) = cpu.rounds(batch, cpu.cut(batch, 1, 1))
    expand_all(part, shape, kernels._packed, kernels._work, kernels._scratch, 1)
    for array in kernels._scratch:
        array[1:] = array[:1]


def pass_variants(kernels: CpuKernels, states: dict[str, Tensor], batch: RaggedBatch) -> dict[str, Callable[[], None]]:
    """Each pass of a decode step by itself; the scratch buffers are as the pass before left them."""
    flat = {name: cpu.flatten(each) for name, each in states.items()}
    (part,) = cpu.rounds(batch, cpu.cut(batch, 1, 1))
    shape, packed, work, scratches = kernels._shape, kernels._packed, kernels._work, kernels._scratch
    threads = kernels._threads
    return {
        "expand": lambda: expand_all(part, shape, packed, work, scratches, threads),
        "attend": lambda: attend_all(part, shape, flat["float32"], work, scratches, threads),
        "attend_bfloat16": lambda: attend_all(part, shape, flat["bfloat16"], work, scratches, threads),
        "contract": lambda: contract_all(part, shape, packed, work, scratches, threads),
    }
