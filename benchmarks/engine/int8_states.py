"""Whether states could be int8 with a scale for each row: an experiment that the server has no part of.

    python -m benchmarks.engine.int8_states --text shakespeare.txt

Contexts of the last tenth of the text are decoded token by token by the bundled model, with the CPU kernels' own passes
but for the one over the states. A row of D numbers is read as integers times its scale, and written with a scale that
only grows, until a window drops a block. Three ways to round what is written:

    nearest     to the nearest multiple
    stochastic  up or down at random, by odds that keep the mean
    feedback    to the nearest, and what is left over is kept as another int8, and added at the next write: as many
                bytes as bfloat16

Writes `int8-states.json`: for each window the mean loss in nats per token, whole and by position, of these and of the
kernels' own states in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bdh_batch.checkpoint.checkpoint import Model, load_model
from bdh_batch.kernels import cpu, cpu_passes, cpu_step
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.cpu_layout import Floats, Packed, Round, Scratch, Shape, Work
from bdh_batch.kernels.vector import in_parallel
from benchmarks.engine.loss import BUNDLED, DTYPES, loss_by_position, name_of, summary, validation
from benchmarks.engine.passes import one_token_each
from benchmarks.report import report_head, results_folder, write_report

NEAREST, STOCHASTIC, FEEDBACK = 0, 1, 2
ROUNDINGS = {"nearest": NEAREST, "stochastic": STOCHASTIC, "feedback": FEEDBACK}
LARGEST = np.float32(127)
HEADROOM = np.float32(1.25)  # by which a scale grows beyond the need, as every growth rounds the whole row again
STEPS = np.float32(254)  # of what is left over, in one multiple

plain = numba.njit(nogil=True, error_model="numpy", fastmath=True)  # loops that LLVM makes vectors of

Chars = npt.NDArray[np.int8]


class Narrow(NamedTuple):
    """States of sequences, [S, layers, blocks, heads, N, D]: the second of two blocks is the window's earlier one."""

    integers: Chars
    left: Chars  # over, as the integers; empty where that is not kept
    scales: Floats  # [S, layers, blocks, heads, N]
    rows: Floats  # [threads, D], of what is being written


def narrow_states(sequences: int, shape: Shape, rounding: int, threads: int) -> Narrow:
    rows = sequences * shape.layers * (2 if shape.half_window else 1) * shape.heads * shape.neurons
    integers = np.zeros(rows * shape.width, np.int8)
    left = np.zeros_like(integers) if rounding == FEEDBACK else np.empty(0, np.int8)
    return Narrow(integers, left, np.zeros(rows, np.float32), np.zeros((threads, shape.width), np.float32))


@plain
def random_number(seed: np.uint32) -> Any:
    """0 to 1: the finaliser of MurmurHash3."""
    seed = np.uint32((seed ^ (seed >> 16)) * 0x85EBCA6B)
    seed = np.uint32((seed ^ (seed >> 13)) * 0xC2B2AE35)
    return np.float32(np.uint32(seed ^ (seed >> 16)) >> 8) * np.float32(2.0**-24)


@plain
def write_row(states: Narrow, n: int, width: int, row: Floats, rounding: int, seed: int) -> None:
    """Rounds a row to the integers of row n."""
    largest = np.float32(0)
    for i in range(width):
        largest = max(largest, abs(row[i]))
    if largest > LARGEST * states.scales[n]:
        states.scales[n] = HEADROOM * largest / LARGEST
    scale, start = states.scales[n], n * width
    inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
    for i in range(width):
        multiple = row[i] * inverse
        if rounding == STOCHASTIC:
            noise = random_number(np.uint32(seed * 0x9E3779B1 + start + i))
            whole = np.floor(multiple + noise)
            states.integers[start + i] = np.int8(min(max(whole, -LARGEST), LARGEST))
        else:
            whole = np.rint(multiple)
            states.integers[start + i] = np.int8(whole)
            if rounding == FEEDBACK:
                states.left[start + i] = np.int8(np.rint((multiple - whole) * STEPS))


@plain
def read_row(states: Narrow, n: int, width: int, row: Floats) -> None:
    start, scale = n * width, states.scales[n]
    if len(states.left):
        for i in range(width):
            row[i] = scale * (states.integers[start + i] + states.left[start + i] * (np.float32(1) / STEPS))
    else:
        for i in range(width):
            row[i] = scale * states.integers[start + i]


@plain
def attend_row(
    states: Narrow, n: int, width: int, q: float, x: Floats, y: Floats, row: Floats, rounding: int, seed: int
) -> None:  # fmt: skip
    """y += q · row n, then row n += q ⊗ x."""
    read_row(states, n, width, row)
    for i in range(width):
        y[i] += q * row[i]
        row[i] += q * x[i]
    write_row(states, n, width, row, rounding, seed)


@plain
def start_block(states: Narrow, first: int, apart: int, rows: int, width: int, row: Floats, rounding: int) -> None:
    """S −= A, then A = S, of some rows; those of A lie `apart` rows behind those of S."""
    other = np.empty(width, np.float32)
    for n in range(first, first + rows):
        read_row(states, n, width, row)
        read_row(states, n + apart, width, other)
        for i in range(width):
            row[i] -= other[i]
        states.scales[n] = 0
        write_row(states, n, width, row, NEAREST if rounding == STOCHASTIC else rounding, 0)
        states.scales[n + apart] = states.scales[n]
        for i in range(width):
            states.integers[(n + apart) * width + i] = states.integers[n * width + i]
            if len(states.left):
                states.left[(n + apart) * width + i] = states.left[n * width + i]


@plain
def attend(
    token: int, layer: int, head: int, part: Round, shape: Shape, states: Narrow, rounding: int, row: Floats,
    work: Work, scratch: Scratch, lists: int,
) -> None:  # fmt: skip
    """The pass over one head's state of one token, whose lists and y are those of a row of the scratch buffers."""
    width, blocks, position = shape.width, 2 if shape.half_window else 1, part.positions[token]
    layer_rows = shape.heads * shape.neurons
    first = (part.slots[token] * shape.layers + layer) * blocks * layer_rows + head * shape.neurons
    if shape.half_window and position % shape.half_window == 0:
        start_block(states, first, layer_rows, shape.neurons, width, row, rounding)
    y = scratch.y[lists * shape.pitch : lists * shape.pitch + shape.pitch]
    y[:] = 0
    x = work.x[token * shape.pitch : token * shape.pitch + shape.pitch]
    entries = lists * shape.list_pitch
    for entry in range(entries, entries + scratch.starts[lists * (shape.panels + 1) + shape.panels]):
        n = first + 2 * scratch.pairs[entry]
        attend_row(states, n, width, scratch.even[entry], x, y, row, rounding, position)
        attend_row(states, n + 1, width, scratch.odd[entry], x, y, row, rounding, position)


@plain
def step_share(
    thread: int, threads: int, part: Round, shape: Shape, weights: Packed, states: Narrow, rounding: int, work: Work,
    scratches: Scratch,
) -> None:  # fmt: skip
    """A token of each of some sequences, through the whole model."""
    scratch = cpu_step.scratch_of(scratches, thread)
    for token in range(thread, len(part.tokens), threads):
        cpu_passes.begin(token, part, shape, weights, work)
        for layer in range(shape.layers):
            for head in range(shape.heads):
                cpu_passes.expand(token, token + 1, layer, head, shape, weights, work, scratch)
                attend(token, layer, head, part, shape, states, rounding, states.rows[thread], work, scratch, 0)
                cpu_passes.contract(token, token + 1, layer, head, shape, weights, work, scratch)
            cpu_passes.finish(token, layer, shape, work)


@in_parallel
def step(
    part: Round, shape: Shape, weights: Packed, states: Narrow, rounding: int, work: Work, scratches: Scratch,
    threads: int,
) -> None:  # fmt: skip
    for thread in numba.prange(threads):
        step_share(thread, threads, part, shape, weights, states, rounding, work, scratches)


def narrow_loss(model: Model, window: int, rounding: int, tokens: Tensor, bar: tqdm[Any]) -> Tensor:
    """Mean over the contexts, which decode side by side: nats [context]."""
    kernels = CpuKernels(model.weights, window)
    shape, work, threads = kernels._shape, kernels._work, kernels._threads
    states = narrow_states(len(tokens), shape, rounding, threads)
    losses = torch.zeros(tokens.shape[1] - 1)
    for position in range(len(losses)):
        batch = one_token_each(tokens[:, position].contiguous(), position)
        (part,) = cpu.rounds(batch, cpu.cut(batch, 1, 1))
        step(part, shape, kernels._packed, states, rounding, work, kernels._scratch, threads)
        hidden = torch.from_numpy(work.x).view(-1, shape.pitch)[: len(tokens), : shape.width]
        losses[position] = F.cross_entropy(kernels.logits(hidden), tokens[:, position + 1])
        bar.update()
    return losses


def losses_of(model: Model, windows: list[int], tokens: Tensor) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for window in windows:
        with tqdm(total=len(DTYPES) * len(tokens), unit="context", desc=f"window {window}", mininterval=10) as bar:
            own = {name_of(dtype): loss_by_position(model, window, dtype, tokens, bar) for dtype in DTYPES}
        with tqdm(
            total=len(ROUNDINGS) * (tokens.shape[1] - 1), unit="token", desc=f"window {window}", mininterval=10
        ) as bar:
            narrow = {
                f"int8, {name}": narrow_loss(model, window, rounding, tokens, bar)
                for name, rounding in ROUNDINGS.items()
            }
        rows += [{"window": window, "states": name, **summary(losses)} for name, losses in (own | narrow).items()]
    return rows


def main() -> None:
    arguments = parse()
    head = report_head(["torch", "numba"])
    model = load_model(arguments.model, torch.float32, torch.device("cpu"))
    tokens = validation(arguments.text, arguments.context)[: arguments.contexts]
    report = {
        **head,
        "model": arguments.model.name,
        "contexts": len(tokens),
        "tokens_of_a_context": arguments.context,
        "losses": losses_of(model, arguments.windows, tokens),
    }
    write_report(arguments.out / "int8-states.json", report)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True, help="a file whose bytes are the tokens")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a model folder")
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 512])
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--contexts", type=int, default=2, help="how many, at most")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args()


if __name__ == "__main__":
    main()
